"""Main table of a report: one row per artifact or run of a study."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laconic.report.entries import ReportEntry, axes_of, common_settings, format_value, has_baseline, setting_of
from laconic.report.pareto import dominated

Rows = list[dict[str, str]]


def headline_rows(entries: Sequence[ReportEntry]) -> Rows:
    """Return formatted cells by column, without columns that are empty in all rows.

    Args:
        entries: The entries.
    """
    axes = axes_of(entries)
    rows = [_cells(e, axes) for e in entries]
    return [{c: v for c, v in row.items() if any(r[c] != "-" for r in rows)} for row in rows]


def dominated_entries(entries: Sequence[ReportEntry]) -> list[bool]:
    """Find the entries that another one dominates: no worse in KL, size and speed, and better in one.

    Args:
        entries: The entries. Only those with a comparison in the most common setting take part; speed counts if all of
            them were timed.

    Returns:
        Whether each entry is dominated.
    """
    setting = next(iter(common_settings(entries)), None)
    indices = [
        i for i, e in enumerate(entries) if e.quality and has_baseline(e.quality) and setting_of(e.quality) == setting
    ]
    timed = all(entries[i].speed is not None for i in indices)
    costs = []
    for i in indices:
        q = entries[i].quality
        assert q is not None
        costs.append((q["kl_mean"], float(q["file_bytes"]), -(entries[i].speed or 0.0) if timed else 0.0))
    by_index = dict(zip(indices, dominated(costs), strict=True))
    return [by_index.get(i, False) for i in range(len(entries))]


def task_matrix(entries: Sequence[ReportEntry]) -> Rows:
    """Return formatted task scores: rows for the original and each artifact, one column per task and main metric.

    Args:
        entries: The entries; those without task results have no row.
    """
    measured = [(e, [r for t in e.tasks for r in t["rows"] if r.get("main")]) for e in entries]
    columns = list(dict.fromkeys(f"{r['task']}, {r['metric']}" for _, rows in measured for r in rows))
    if not columns:
        return []
    original: dict[str, str] = {}
    table = []
    for entry, rows in measured:
        scores = {}
        for r in rows:
            column, retention = f"{r['task']}, {r['metric']}", r.get("retention")
            share = "" if retention is None else f" ({retention:.1%})"
            scores[column] = _with_error(r["value"], r["stderr"]) + share
            if r.get("baseline") is not None:
                original.setdefault(column, _with_error(r["baseline"], r["baseline_stderr"]))
        if rows:
            table.append({"artifact": entry.name} | {c: scores.get(c, "-") for c in columns})
    first = [{"artifact": "original"} | {c: original.get(c, "-") for c in columns}] if original else []
    return first + table


def _split_evaluations(entry: ReportEntry) -> list[ReportEntry]:
    return [replace(entry, evaluations=[r]) for r in entry.evaluations] or [entry]


def as_csv(entries: Sequence[ReportEntry]) -> str:
    """Return the figures of the table as CSV, unrounded, with one row per evaluation.

    Args:
        entries: The entries, at least one.
    """
    axes = axes_of(entries)
    rows = [_numbers(e, axes) for entry in entries for e in _split_evaluations(entry)]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _numbers(entry: ReportEntry, axes: Sequence[str]) -> dict[str, Any]:
    q, compression = entry.quality or {}, entry.compression or {}
    keys = ("file_bytes", "baseline_file_bytes", "bits_per_weight", "perplexity", "baseline_perplexity", "kl_mean")
    measured = {k: q.get(k) for k in (*keys, "kl_p99", "top1_agreement", "text", "context_length", "windows")}
    return {
        "name": entry.name,
        **{axis: entry.values.get(axis) for axis in axes},
        **measured,
        "task_retention": entry.retention,
        "decoding_tokens_per_second": (entry.decoding or {}).get("tokens_per_second"),
        "decoding_speedup": entry.speed,
        "compress_seconds": compression.get("seconds"),
        "compress_peak_bytes": compression.get("peak_memory_bytes"),
        "error": entry.error,
    }


def _cells(entry: ReportEntry, axes: Sequence[str]) -> dict[str, str]:
    q, compression, decoding = entry.quality, entry.compression or {}, entry.decoding
    cells = (
        {axis: format_value(entry.values.get(axis, "-")) for axis in axes} if entry.values else {"artifact": entry.name}
    )
    if entry.error:
        cells[next(iter(cells))] += f" (failed: {entry.error})"
    with_original = q is not None and has_baseline(q)
    original_bytes = q.get("baseline_file_bytes") if q else None
    return cells | {
        "schemes": _schemes(q) if q else "-",
        "size": (
            f"{q['file_bytes'] / 1e6:.2f} MB"
            + (f", {original_bytes / q['file_bytes']:.2f}x smaller" if original_bytes else "")
        )
        if q
        else "-",
        "bits/weight": f"{q['bits_per_weight']:.2f}" if q else "-",
        "perplexity": (
            f"{q['perplexity']:.3f}" + (f" (original {q['baseline_perplexity']:.3f})" if with_original else "")
        )
        if q
        else "-",
        "KL mean / p99": f"{q['kl_mean']:.4f} / {q['kl_p99']:.3f}" if q and with_original else "-",
        "same top-1": f"{q['top1_agreement']:.1%}" if q and with_original else "-",
        "task retention": "-" if entry.retention is None else f"{entry.retention:.1%}",
        "tokens/s": "-" if decoding is None else f"{decoding['tokens_per_second']:.4g} ({decoding['speedup']:.2f}x)",
        "compression time": f"{compression['seconds']:.1f} s" if compression.get("seconds") is not None else "-",
        "compression peak memory": f"{compression['peak_memory_bytes'] / 1e9:.2f} GB"
        if compression.get("peak_memory_bytes")
        else "-",
    }


def _schemes(q: dict[str, Any]) -> str:
    schemes = ", ".join(f"{n} x {s}" for s, n in q.get("schemes", {}).items()) or "none"
    return schemes + (" (simulated)" if q.get("simulated") else "")


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
