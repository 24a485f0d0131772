"""Success criteria of the project, each met, missed or not measured, with the measured figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from laconic.report.entries import ReportEntry

Status = Literal["met", "missed", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a criterion for one artifact.

    Attributes:
        status: Whether the criterion is met, missed or not measured.
        figure: The measured figure, or why there is none.
    """

    status: Status
    figure: str


@dataclass(frozen=True)
class Criterion:
    """A success criterion.

    Attributes:
        title: Statement of the criterion.
        judge: Function from an entry to the verdict.
    """

    title: str
    judge: Callable[[ReportEntry], Verdict]


def judge_entry(entry: ReportEntry) -> list[tuple[str, Verdict]]:
    """Return the title of every criterion with the verdict for one entry.

    Args:
        entry: The entry.
    """
    return [(criterion.title, criterion.judge(entry)) for criterion in CRITERIA]


def checklist(entries: Sequence[ReportEntry]) -> list[tuple[str, list[tuple[Status, str]]]]:
    """Summarize the verdicts of several entries.

    Args:
        entries: The entries.

    Returns:
        For every criterion its title, and pairs of a status and text that lists the entries and figures with this
        status. If all entries have the same verdict, the text is the figure only.
    """
    statuses: tuple[Status, ...] = ("met", "missed", "not measured")
    verdicts = [(entry.name, dict(judge_entry(entry))) for entry in entries]
    rows = []
    for title in (criterion.title for criterion in CRITERIA):
        names: dict[Verdict, list[str]] = {}
        for name, by_title in verdicts:
            names.setdefault(by_title[title], []).append(name)
        texts = {v: v.figure if len(names) == 1 else f"{_join(group)}: {v.figure}" for v, group in names.items()}
        lines = [(status, "; ".join(text for v, text in texts.items() if v.status == status)) for status in statuses]
        rows.append((title, [(status, text) for status, text in lines if text]))
    return rows


def _at_least(value: float | None, threshold: float, template: str, missing: str) -> Verdict:
    if value is None:
        return Verdict("not measured", missing)
    return Verdict("met" if value >= threshold else "missed", template.format(value))


def _memory(entry: ReportEntry) -> Verdict:
    r = entry.quality
    ratio = r["baseline_file_bytes"] / r["file_bytes"] if r and r.get("baseline_file_bytes") else None
    bits = r.get("baseline_bits_per_weight") if r else None
    if ratio is not None and bits and bits > 16.5:
        ratio *= 16 / bits
    return _at_least(ratio, 4, "files {:.2f}x smaller than in BF16", "no evaluation with the original")


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} artifacts"


def _mmlu(smallest: float, largest: float, threshold: float) -> Callable[[ReportEntry], Verdict]:
    """Require an MMLU drop of at most `threshold` points for models of `smallest` to `largest` billion parameters."""

    def judge(entry: ReportEntry) -> Verdict:
        size = (entry.quality or {}).get("parameters")
        if size is not None and not smallest <= size / 1e9 <= largest:
            return Verdict("not measured", f"a model of {_count(size)} parameters")
        row = _row(entry.tasks, "mmlu")
        if row is None:
            return Verdict("not measured", "no MMLU result with the original")
        if size is None:
            return Verdict("not measured", "size of the model not measured")
        drop = -100 * row["difference"]
        error = f" ± {100 * row['difference_stderr']:.1f}" if row.get("difference_stderr") else ""
        return Verdict("met" if drop <= threshold else "missed", f"{-drop:+.1f}{error} points")

    return judge


def _retention(entry: ReportEntry) -> Verdict:
    """Require a retention of 98 %; undecided within two standard errors, since few documents can give 114 % by luck."""
    worst = entry.worst_tasks
    if worst is None:
        return Verdict("not measured", "no task results with the original")
    retention, error = float(worst["mean_retention"]), _retention_error(worst["rows"])
    figure = f"{retention:.1%}" + ("" if error is None else f" ± {error:.1%}")
    if error is not None and abs(retention - 0.98) < 2 * error:
        return Verdict("not measured", f"{figure}, too few documents to decide")
    return Verdict("met" if retention >= 0.98 else "missed", figure)


def _retention_error(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the standard error of the mean retention, from paired differences; None if one is not known."""
    main = [r for r in rows if r.get("main")]
    if not main or any(not r.get("baseline") or r.get("difference_stderr") is None for r in main):
        return None
    return math.sqrt(sum((r["difference_stderr"] / r["baseline"]) ** 2 for r in main)) / len(main)


def _speed(entry: ReportEntry) -> Verdict:
    return _at_least(entry.speed, 1.8, "{:.2f}x the original", "no `laconic bench` result with the original")


def _cache(part: str, key: str, threshold: float, larger: bool, template: str) -> Callable[[ReportEntry], Verdict]:
    """Compare the best cache with the first one (16 bit) at contexts of at least 32k tokens."""

    def judge(entry: ReportEntry) -> Verdict:
        ratios = []
        for result in entry.long:
            caches = result["caches"]
            if part not in result or len(caches) < 2:
                continue
            plain = {row["length"]: row[key] for row in result[part][caches[0]]}
            for name in caches[1:]:
                for row in result[part][name]:
                    if row["length"] >= 32_000 and row["length"] in plain:
                        ratio = row[key] / plain[row["length"]]
                        ratios.append(ratio if larger else 1 / ratio)
        return _at_least(
            max(ratios) if ratios else None, threshold, template, "no cache measured at 32k tokens or more"
        )

    return judge


CRITERIA: Sequence[Criterion] = (
    Criterion("weight memory at most 1/4 of BF16", _memory),
    Criterion("MMLU drop at most 2 points, 7 to 13 billion parameters", _mmlu(6, 14, 2.0)),
    Criterion("MMLU drop at most 1 point, 30 to 70 billion parameters", _mmlu(29, 73, 1.0)),
    Criterion("mean task retention at least 98 %", _retention),
    Criterion("decoding speed at least 1.8x", _speed),
    Criterion(
        "cache memory at most 1/2 at 32k-64k tokens", _cache("memory", "request_bytes", 2.0, False, "{:.2f}x smaller")
    ),
    Criterion(
        "throughput at least 1.3x at 32k-64k tokens", _cache("speed", "tokens_per_second", 1.3, True, "{:.2f}x faster")
    ),
)


def _row(tasks: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    rows = [row for result in tasks if result["baseline"] is not None for row in result["rows"]]
    return next((row for row in rows if row["task"] == name and row["metric"].startswith("acc")), None)


def _count(parameters: float) -> str:
    size, name = next(((n, w) for n, w in ((1e9, "billion"), (1e6, "million")) if parameters >= n), (1e3, "thousand"))
    return f"{parameters / size:.3g} {name}"
