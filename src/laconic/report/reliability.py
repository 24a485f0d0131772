"""Reliability diagrams: accuracy of predictions over their confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart


def reliability_diagram(name: str, calibration: Mapping[str, Any]) -> str:
    """Draw accuracy over confidence, one mark per bin; all bins have the same number of predictions.

    The dotted line is perfect calibration; a model below it is overconfident. The original, if measured, is grey.

    Args:
        name: Name of the model or the data.
        calibration: Key `calibration` of a result, or of a task in it.

    Returns:
        The SVG.
    """
    perfect = Series(
        "perfect calibration", [Mark(v, v, "", size=0) for v in (0.0, 1.0)], line=True, dotted=True, colour=6
    )
    series = [perfect]
    if "baseline_reliability" in calibration:
        title = f"original, ECE {calibration['baseline_ece']:.4f}"
        series.append(Series(title, _marks(calibration["baseline_reliability"]), line=True, colour=7))
    marks = _marks(calibration["reliability"])
    series.append(Series(f"{name}, ECE {calibration['ece']:.4f}", marks, line=True, colour=0))
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    x, y = Axis("confidence", ticks=ticks), Axis("accuracy", ticks=ticks)
    return chart(f"Reliability, {name}", series, x, y, height=420)


def reliability_diagrams(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Draw a diagram for every part of a result that has the data for one.

    Args:
        result: Result of `laconic eval` on a text, on domains or on tasks.

    Returns:
        Pairs of the name of a part and its SVG; empty for results of versions without calibration.
    """
    parts = [(name, part) for name, part in _parts(result) if part and part.get("reliability")]
    return [(name, reliability_diagram(name, part)) for name, part in parts]


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
            f"{b['count']} predictions, confidence {b['confidence']:.3f}, accuracy {b['accuracy']:.3f}",
            size=4,
        )
        for b in bins
    ]
