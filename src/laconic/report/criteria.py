"""What Laconic sets out to reach, as a checklist: met, missed or not measured, with the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from laconic.report.gathered import Evaluated

Status = Literal["met", "missed", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """figure: what was measured, or why nothing was."""

    status: Status
    figure: str


@dataclass(frozen=True)
class Criterion:
    """A bar, and how an artifact stands to it."""

    title: str
    judge: Callable[[Evaluated], Verdict]


def judged(entry: Evaluated) -> list[tuple[str, Verdict]]:
    """Every bar with how the artifact stands to it."""
    return [(criterion.title, criterion.judge(entry)) for criterion in CRITERIA]


def checklist(entries: Sequence[Evaluated]) -> list[tuple[str, list[tuple[Status, str]]]]:
    """Every bar, and under each status who has it by which figure; names are left out where all have one figure."""
    orders: tuple[Status, ...] = ("met", "missed", "not measured")
    verdicts = [(entry.name, dict(judged(entry))) for entry in entries]
    listed = []
    for title in (criterion.title for criterion in CRITERIA):
        by: dict[Verdict, list[str]] = {}
        for name, found in verdicts:
            by.setdefault(found[title], []).append(name)
        said = {v: v.figure if len(by) == 1 else f"{_listed(names)}: {v.figure}" for v, names in by.items()}
        lines = [(status, "; ".join(words for v, words in said.items() if v.status == status)) for status in orders]
        listed.append((title, [(status, words) for status, words in lines if words]))
    return listed


def _at_least(value: float | None, bar: float, shape: str, missing: str) -> Verdict:
    if value is None:
        return Verdict("not measured", missing)
    return Verdict("met" if value >= bar else "missed", shape.format(value))


def _memory(entry: Evaluated) -> Verdict:
    r = entry.quality
    less = r["baseline_file_bytes"] / r["file_bytes"] if r and r.get("baseline_file_bytes") else None
    bits = r.get("baseline_bits_per_weight") if r else None
    if less is not None and bits and bits > 16.5:
        less *= 16 / bits
    return _at_least(less, 4, "{:.2f}x less, files against BF16", "no evaluation beside the original")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} of them"


def _mmlu(least: float, most: float, bar: float) -> Callable[[Evaluated], Verdict]:
    """MMLU falls by at most `bar` points in models of `least` to `most` billion parameters."""

    def judge(entry: Evaluated) -> Verdict:
        size = (entry.quality or {}).get("parameters")
        if size is not None and not least <= size / 1e9 <= most:
            return Verdict("not measured", f"a model of {_count(size)} parameters")
        row = _row(entry.tasks, "mmlu")
        if row is None:
            return Verdict("not measured", "MMLU was not run beside the original")
        if size is None:
            return Verdict("not measured", "how large the model is was not measured")
        fell = -100 * row["difference"]
        error = f" ± {100 * row['difference_stderr']:.1f}" if row.get("difference_stderr") else ""
        return Verdict("met" if fell <= bar else "missed", f"{-fell:+.1f}{error} points")

    return judge


def _retention(entry: Evaluated) -> Verdict:
    """Neither met nor missed where the bar lies within two standard errors: guesses at few questions keep 114 %."""
    worst = entry.worst_tasks
    if worst is None:
        return Verdict("not measured", "no tasks beside the original")
    kept, error = float(worst["mean_retention"]), _retention_error(worst["rows"])
    if error is not None and abs(kept - 0.98) < 2 * error:
        return Verdict("not measured", f"{kept:.1%} ± {error:.1%} kept, too few documents to tell")
    return Verdict("met" if kept >= 0.98 else "missed", f"{kept:.1%}{'' if error is None else f' ± {error:.1%}'} kept")


def _retention_error(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard error of the mean retention, from the paired differences; None where one is not known."""
    main = [r for r in rows if r.get("main")]
    if not main or any(not r.get("baseline") or r.get("difference_stderr") is None for r in main):
        return None
    return math.sqrt(sum((r["difference_stderr"] / r["baseline"]) ** 2 for r in main)) / len(main)


def _speed(entry: Evaluated) -> Verdict:
    return _at_least(entry.speed, 1.8, "{:.2f}x the original's", "no `laconic bench` beside the original")


def _cache(part: str, key: str, bar: float, larger: bool, said: str) -> Callable[[Evaluated], Verdict]:
    """The best cache against the first (16 bit), in a context of 32k tokens or more."""

    def judge(entry: Evaluated) -> Verdict:
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
        return _at_least(max(ratios) if ratios else None, bar, said, "no cache was measured at 32k tokens or more")

    return judge


CRITERIA: Sequence[Criterion] = (
    Criterion("weights in a quarter of BF16's memory, or less", _memory),
    Criterion("MMLU within 2 points, 7 to 13 billion parameters", _mmlu(6, 14, 2.0)),
    Criterion("MMLU within 1 point, 30 to 70 billion parameters", _mmlu(29, 73, 1.0)),
    Criterion("98 % of the original over tasks, or more", _retention),
    Criterion("1.8 times the tokens a second, or more", _speed),
    Criterion(
        "the cache in half the memory at 32-64k tokens", _cache("memory", "request_bytes", 2.0, False, "{:.2f}x less")
    ),
    Criterion(
        "1.3 times the throughput at 32-64k tokens", _cache("speed", "tokens_per_second", 1.3, True, "{:.2f}x as many")
    ),
)


def _row(tasks: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    rows = [row for result in tasks if result["baseline"] is not None for row in result["rows"]]
    found = [row for row in rows if row["task"] == name and row["metric"].startswith("acc")]
    return found[0] if found else None


def _count(parameters: float) -> str:
    size, name = next(((n, w) for n, w in ((1e9, "billion"), (1e6, "million")) if parameters >= n), (1e3, "thousand"))
    return f"{parameters / size:.3g} {name}"
