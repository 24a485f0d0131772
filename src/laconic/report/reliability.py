"""Whether a model is as sure as it is right, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart


def reliability_diagram(name: str, calibration: Mapping[str, Any]) -> str:
    """Accuracy by confidence, a mark a bin, all bins being of equally many predictions; the dotted line is a model that
    is as sure as it is right, below it are those that are too sure. The original, where it is there, in grey.

    calibration: of a result: its `calibration`, or one of a task's.
    """
    sure = Series("as sure as right", [Mark(v, v, "", size=0) for v in (0.0, 1.0)], line=True, dotted=True, colour=6)
    series = [sure]
    if "baseline_reliability" in calibration:
        title = f"original, ECE {calibration['baseline_ece']:.4f}"
        series.append(Series(title, _marks(calibration["baseline_reliability"]), line=True, colour=7))
    marks = _marks(calibration["reliability"])
    series.append(Series(f"{name}, ECE {calibration['ece']:.4f}", marks, line=True, colour=0))
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    x, y = Axis("confidence", ticks=ticks), Axis("share right", ticks=ticks)
    return chart(f"Reliability, {name}", series, x, y, height=420)


def reliability_diagrams(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a result of `laconic eval`, on a text, on domains or on tasks, the name and the diagram of each part that has
    one; none for a result of before there were any."""
    found = [(named, part) for named, part in _parts(result) if part and part.get("reliability")]
    return [(named, reliability_diagram(named, part)) for named, part in found]


def _parts(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    if "domains" in result:
        return [(str(row["domain"]), row["calibration"]) for row in result["domains"]]
    if "tasks" in result:
        return [(str(row["task"]), row) for row in result.get("calibration", [])]
    return [(f"next tokens of {result['text']}", result["calibration"])] if "calibration" in result else []


def _marks(bins: Sequence[Mapping[str, Any]]) -> list[Mark]:
    return [
        Mark(
            b["confidence"],
            b["accuracy"],
            f"{b['count']} predictions, confidence {b['confidence']:.3f}, right {b['accuracy']:.3f}",
            size=4,
        )
        for b in bins
    ]
