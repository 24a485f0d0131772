"""Whether a model is as sure as it is right, as a picture: an SVG that needs nothing to be drawn or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_SIDE, _LEFT, _TOP, _RIGHT, _BOTTOM = 320, 56, 34, 24, 70
_ORIGINAL, _OURS, _LINE = "#9a9a96", "#2f6f5e", "#d9d9d4"


def reliability_diagram(name: str, calibration: Mapping[str, Any]) -> str:
    """Accuracy by confidence, a mark a bin, all bins being of equally many predictions; the diagonal is a model that is
    as sure as it is right, below it are those that are too sure. The original, where it is there, in grey.

    calibration: of a result: its `calibration`, or one of a task's.
    """
    parts = [_text(_LEFT, 20, name, "start", weight="bold")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _at(tick, tick)
        parts.append(_segment(_at(tick, 0), _at(tick, 1), _LINE))
        parts.append(_segment(_at(0, tick), _at(1, tick), _LINE))
        parts.append(_text(x, _TOP + _SIDE + 17, f"{tick:g}", "middle"))
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    parts.append(_segment(_at(0, 0), _at(1, 1), "#7a7a7a", dashed=True))
    said = f"ECE {calibration['ece']:.4f}"
    if "baseline_reliability" in calibration:
        parts += _curve(calibration["baseline_reliability"], _ORIGINAL)
        said += f" in green; the original, {calibration['baseline_ece']:.4f}, in grey"
    parts += _curve(calibration["reliability"], _OURS)
    parts.append(_text(_LEFT, _TOP + _SIDE + 38, "across: confidence; up: share right", "start"))
    parts.append(_text(_LEFT, _TOP + _SIDE + 56, said, "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="reliability of {escape(name)}" '
        f'width="{_LEFT + _SIDE + _RIGHT}" height="{_TOP + _SIDE + _BOTTOM}" '
        'font-family="system-ui, sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="#fdfdfb"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


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


def _at(x: float, y: float) -> tuple[float, float]:
    return _LEFT + _SIDE * x, _TOP + _SIDE * (1 - y)


def _curve(bins: Sequence[Mapping[str, Any]], colour: str) -> list[str]:
    points = [_at(b["confidence"], b["accuracy"]) for b in bins]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{b["count"]} predictions, confidence '
        f"{b['confidence']:.3f}, right {b['accuracy']:.3f}</title></circle>"
        for (x, y), b in zip(points, bins, strict=True)
    ]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *marks]


def _segment(a: tuple[float, float], b: tuple[float, float], colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{colour}"{dash}/>'


def _text(x: float, y: float, said: str, anchor: str, *, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="#1c1c1c">{escape(said)}</text>'
