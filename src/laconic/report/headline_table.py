"""The table that a page begins with: a row an artifact, or a run of a study."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laconic.report.gathered import Evaluated, axes_of, compared, ground, grounds, spelled
from laconic.report.pareto import dominated

Rows = list[dict[str, str]]


def headline_rows(entries: Sequence[Evaluated]) -> Rows:
    """Formatted cells by column; columns in which nothing was measured are left out."""
    axes = axes_of(entries)
    rows = [_cells(e, axes) for e in entries]
    return [{c: v for c, v in row.items() if any(r[c] != "-" for r in rows)} for row in rows]


def beaten(entries: Sequence[Evaluated]) -> list[bool]:
    """Of each, whether another is no worse in KL, size and (where all were timed) speed, and better in one. What was
    not compared with the original on the same ground as most beats nothing and is not beaten.
    """
    where = next(iter(grounds(entries)), None)
    places = [i for i, e in enumerate(entries) if e.quality and compared(e.quality) and ground(e.quality) == where]
    timed = all(entries[i].speed is not None for i in places)
    costs = []
    for i in places:
        q = entries[i].quality
        assert q is not None
        costs.append((q["kl_mean"], float(q["file_bytes"]), -(entries[i].speed or 0.0) if timed else 0.0))
    out = dict(zip(places, dominated(costs), strict=True))
    return [out.get(i, False) for i in range(len(entries))]


def task_matrix(entries: Sequence[Evaluated]) -> Rows:
    """Formatted cells: a row the original and an artifact, a column a task by the metric that stands for it."""
    measured = [(e, [r for t in e.tasks for r in t["rows"] if r.get("main")]) for e in entries]
    columns = list(dict.fromkeys(f"{r['task']}, {r['metric']}" for _, rows in measured for r in rows))
    if not columns:
        return []
    theirs: dict[str, str] = {}
    made = []
    for e, rows in measured:
        ours = {}
        for r in rows:
            column, kept = f"{r['task']}, {r['metric']}", r.get("retention")
            ours[column] = _with_error(r["value"], r["stderr"]) + ("" if kept is None else f" ({kept:.1%})")
            if r.get("baseline") is not None:
                theirs.setdefault(column, _with_error(r["baseline"], r["baseline_stderr"]))
        if rows:
            made.append({"artifact": e.name} | {c: ours.get(c, "-") for c in columns})
    first = [{"artifact": "original"} | {c: theirs.get(c, "-") for c in columns}] if theirs else []
    return first + made


def _one_by_one(entry: Evaluated) -> list[Evaluated]:
    return [replace(entry, evaluations=[r]) for r in entry.evaluations] or [entry]


def as_csv(entries: Sequence[Evaluated]) -> str:
    """The figures of the table, unrounded: a row an evaluation, where there are several of an artifact."""
    axes = axes_of(entries)
    each = [e for one in entries for e in _one_by_one(one)]
    rows = [_numbers(e, axes) for e in each]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _numbers(entry: Evaluated, axes: Sequence[str]) -> dict[str, Any]:
    q, made = entry.quality or {}, entry.compression or {}
    keys = ("file_bytes", "baseline_file_bytes", "bits_per_weight", "perplexity", "baseline_perplexity", "kl_mean")
    measured = {k: q.get(k) for k in (*keys, "kl_p99", "top1_agreement", "text", "context_length", "windows")}
    return {
        "name": entry.name,
        **{axis: entry.values.get(axis) for axis in axes},
        **measured,
        "task_retention": entry.retention,
        "decoding_tokens_per_second": (entry.decoding or {}).get("tokens_per_second"),
        "decoding_speedup": entry.speed,
        "compress_seconds": made.get("seconds"),
        "compress_peak_bytes": made.get("peak_memory_bytes"),
        "error": entry.error,
    }


def _cells(entry: Evaluated, axes: Sequence[str]) -> dict[str, str]:
    q, made, timed = entry.quality, entry.compression or {}, entry.decoding
    cells = {axis: spelled(entry.values.get(axis, "-")) for axis in axes} if entry.values else {"artifact": entry.name}
    if entry.error:
        cells[next(iter(cells))] += f" (failed: {entry.error})"
    beside = q is not None and compared(q)
    theirs = q.get("baseline_file_bytes") if q else None
    return cells | {
        "schemes": _schemes(q) if q else "-",
        "size": (f"{q['file_bytes'] / 1e6:.2f} MB" + (f", {theirs / q['file_bytes']:.2f}x less" if theirs else ""))
        if q
        else "-",
        "bits/weight": f"{q['bits_per_weight']:.2f}" if q else "-",
        "perplexity": (f"{q['perplexity']:.3f}" + (f" (was {q['baseline_perplexity']:.3f})" if beside else ""))
        if q
        else "-",
        "KL mean / p99": f"{q['kl_mean']:.4f} / {q['kl_p99']:.3f}" if q and beside else "-",
        "same top-1": f"{q['top1_agreement']:.1%}" if q and beside else "-",
        "tasks kept": "-" if entry.retention is None else f"{entry.retention:.1%}",
        "tokens/s": "-" if timed is None else f"{timed['tokens_per_second']:.4g} ({timed['speedup']:.2f}x)",
        "compressed in": f"{made['seconds']:.1f} s" if made.get("seconds") is not None else "-",
        "peak memory of that": f"{made['peak_memory_bytes'] / 1e9:.2f} GB" if made.get("peak_memory_bytes") else "-",
    }


def _schemes(q: dict[str, Any]) -> str:
    said = ", ".join(f"{n} x {s}" for s, n in q.get("schemes", {}).items()) or "none"
    return said + (" (simulated)" if q.get("simulated") else "")


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
