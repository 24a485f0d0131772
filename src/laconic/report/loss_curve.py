"""How a training went, as a picture: an SVG that needs nothing to be drawn or read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 260, 60, 34, 46
_TRAINED, _HELD, _LINE = "#9a9a96", "#2f6f5e", "#d9d9d4"


def loss_curve(name: str, result: Mapping[str, Any]) -> str:
    """The loss of each step, and the held-out loss; a mark where the adapters that were taken stand. result: of
    `results/training-METHOD.json`."""
    steps = [(c["step"], c["loss"]) for c in result["curve"]]
    held = [(m["step"], m["loss"]) for m in result["held_out"]]
    losses = [y for _, y in (*steps, *held)]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, last = low - margin, high + margin, max(1, result["steps"])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 20) * point[0] / last
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - point[1]) / (high - low)

    parts = [_text(_LEFT, 20, name, "start", weight="bold")]
    for value in _ticks(low, high):
        y = at((0, value))[1]
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 20}" y2="{y:.1f}" stroke="{_LINE}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", "end"))
    for step in (0, last // 2, last) if last > 1 else (0, 1):
        parts.append(_text(at((step, low))[0], _HEIGHT - 28, str(step), "middle"))
    parts.append(_line([at(p) for p in steps], _TRAINED, 1))
    parts.append(_line([at(p) for p in held], _HELD, 2))
    best = next((p for p in held if p[0] == result["best_step"]), None)
    if best:
        x, y = at(best)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_HELD}"/>')
    what = "nats a token" if result["loss"] == "lm" else "nats a token, to the original"
    parts.append(_text(_LEFT, _HEIGHT - 8, f"loss ({what}) by step: grey in training, green held out", "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="#fdfdfb"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(points: Sequence[tuple[float, float]], colour: str, width: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, said: str, anchor: str, *, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="#1c1c1c">{escape(said)}</text>'
