"""Needles found, as a picture: an SVG file that needs nothing to be drawn or read."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 64, 30, 70
_NONE, _ALL = (181, 71, 47), (47, 111, 94)


def heat_map(result: Mapping[str, Any]) -> str:
    """Of a result of `laconic eval --suite long` that has needles, one map a cache: depth by length, in each cell how
    many were found."""
    parts: list[str] = []
    top = right = 0
    for name in result["caches"]:
        cells = result["needle"][name]
        lengths = list(dict.fromkeys(c["length"] for c in cells))
        depths = list(dict.fromkeys(c["depth"] for c in cells))
        parts.append(_text(_MARGIN, top + 22, name, "start", weight="bold"))
        for cell in cells:
            x = _MARGIN + lengths.index(cell["length"]) * _WIDTH
            y = top + 34 + depths.index(cell["depth"]) * _HEIGHT
            fill = _colour(cell["found"] / cell["trials"])
            parts.append(f'<rect x="{x}" y="{y}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{fill}"/>')
            said = f"{cell['found']}/{cell['trials']}"
            parts.append(_text(x + _WIDTH / 2 - 1, y + _HEIGHT / 2 + 4, said, "middle", fill="white"))
        for i, depth in enumerate(depths):
            parts.append(_text(_MARGIN - 8, top + 34 + i * _HEIGHT + _HEIGHT / 2 + 4, f"{depth:.0%}", "end"))
        bottom = top + 34 + len(depths) * _HEIGHT
        for i, length in enumerate(lengths):
            parts.append(_text(_MARGIN + i * _WIDTH + _WIDTH / 2 - 1, bottom + 16, str(length), "middle"))
        right = max(right, _MARGIN + len(lengths) * _WIDTH, _MARGIN + 8 * len(name))
        top = bottom + 28
    parts.append(_text(_MARGIN, top + 10, "down: depth of the needle; across: tokens", "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(right, 360) + 20}" height="{top + 24}" '
        'font-family="system-ui, sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="#fdfdfb"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _colour(share: float) -> str:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_NONE, _ALL, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _text(x: float, y: float, said: str, anchor: str, *, fill: str = "#1c1c1c", weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">{escape(said)}</text>'
    )
