"""Charts as SVG: small, readable without a script, coloured by the page (also in the dark), with words on each mark.

Plotly's script alone is 4.5 MB a page, which is more than all of a study's results; these take a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

# Narrow enough that its words can be read on a phone, where it is drawn at three quarters of its size.
WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 40, 50
_LETTER, _LINE = 7, 20
# Of a row's name, which has the edge beside it: letters are larger on a phone.
_LARGE = 8


@dataclass(frozen=True)
class Mark:
    """A point. said: what hovering tells. label: what stands beside it. low, high: the ends of its error bar. faint:
    grey, behind the others. hollow: a ring. size: its radius."""

    x: float
    y: float
    said: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    faint: bool = False
    hollow: bool = False
    size: float = 5.0


@dataclass(frozen=True)
class Series:
    """Points of one colour. line: whether they are joined; dotted: how."""

    name: str
    marks: Sequence[Mark]
    line: bool = False
    dotted: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Axis:
    """zero: whether it begins there. ticks: where, if not at round numbers; names: of categories, at 0, 1, 2, ..."""

    title: str
    log: bool = False
    zero: bool = False
    show: Callable[[float], str] = lambda v: f"{v:g}"
    ticks: Sequence[float] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Scale:
    """From a value to a place between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (v - low) / (high - low)


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 340) -> str:
    """Points and lines over two axes. Values that a logarithm has none of are left out."""
    shown = [_drawable(s, x, y) for s in series]
    marks = [m for s in shown for m in s.marks]
    if not marks:
        return ""
    across = _scale([m.x for m in marks], x, _LEFT, WIDTH - _RIGHT)
    ends = [v for m in marks for v in (m.low, m.high) if v is not None and (v > 0 or not y.log)]
    legend, lines = _legend(shown, height)
    # Long names of categories stand aslant, below one another's beginnings.
    longest = max((len(n) for n in x.names), default=0)
    crowded = longest * _LETTER * len(x.names) > WIDTH - _LEFT - _RIGHT
    bottom = height - _BOTTOM - (min(90, longest * 4) if crowded else 0)
    up = _scale([*(m.y for m in marks), *ends], y, bottom, _TOP)
    parts = [*_grid(x, y, across, up, bottom, height, crowded), _text(0, 18, _cut(title, 56), "start", "title")]
    # What is faint lies below the rest.
    for number, one in sorted(enumerate(shown), key=lambda pair: not any(m.faint for m in pair[1].marks)):
        parts += _drawn(one, one.colour if one.colour is not None else number, across, up)
    return svg(title, height + lines * _LINE, [*parts, *legend])


def heat(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    shade: Callable[[int, int], float | None],
    said: Callable[[int, int], str],
    *,
    words: Callable[[int, int], str] = lambda _row, _column: "",
    across: str = "",
    down: str = "",
) -> str:
    """A map of cells. shade: of a row and a column, from 0 to 1, None where there is no cell. said: what hovering
    tells; words: what stands in the cell."""
    left = min(170, 16 + _LARGE * max(len(r) for r in rows))
    wide = max(4.0, min(64.0, (WIDTH - left - _RIGHT) / len(columns)))
    tall = 22
    parts = [_text(0, 18, _cut(title, 56), "start", "title")]
    for i, row in enumerate(rows):
        top = _TOP + i * tall
        parts.append(_text(left - 8, top + 15, _cut(row, (left - 8) // _LARGE), "end"))
        for j in range(len(columns)):
            level = shade(i, j)
            if level is not None:
                place = f'x="{left + j * wide:.1f}" y="{top}" width="{max(1.0, wide - 1):.1f}" height="{tall - 1}"'
                cell = f'<rect class="cell" {place} style="--level:{min(1.0, max(0.0, level)):.3f}"/>'
                inside = words(i, j)
                if inside:
                    cell += _text(
                        left + (j + 0.5) * wide, top + 15, inside, "middle", "inside on" if level > 0.5 else "inside"
                    )
                parts.append(_hover(cell, said(i, j)))
    bottom = _TOP + len(rows) * tall
    step = max(1, math.ceil(len(columns) * (_LETTER * max(len(c) for c in columns) + 8) / (WIDTH - left - _RIGHT)))
    for j in range(0, len(columns), step):
        parts.append(_text(left + (j + 0.5) * wide, bottom + 16, columns[j], "middle"))
    legend = "; ".join(
        word for word in (f"across: {across}" if across else "", f"down: {down}" if down else "") if word
    )
    parts.append(_text(0, bottom + 36, legend, "start"))
    return svg(title, bottom + 44, parts)


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    """The picture of its parts."""
    inside = "\n".join(part for part in parts if part)
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">\n{inside}\n</svg>'
    )


def standalone(picture: str) -> str:
    """The same as a file of its own: with its colours, on paper."""
    style = files("laconic.report").joinpath("templates/chart.css").read_text(encoding="utf-8")
    head, _, rest = picture.partition(">")
    return f'{head}>\n<style>\n{style}</style>\n<rect width="100%" height="100%" fill="var(--paper)"/>{rest}\n'


def stacked(pictures: Sequence[str]) -> str:
    """Pictures one below another, in one."""
    parts, top = [], 0.0
    for picture in pictures:
        height = float(picture.partition(f'viewBox="0 0 {WIDTH} ')[2].partition('"')[0])
        inside = picture.removeprefix('<svg class="chart"')
        parts.append(f'<svg y="{top:g}" width="{WIDTH}" height="{height:g}"{inside}')
        top += height
    return svg("", top, parts)


def ticks_between(low: float, high: float, count: int = 5) -> list[float]:
    """A few round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= count)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    kept = [
        m for m in series.marks if all(math.isfinite(v) and (v > 0 or not axis.log) for v, axis in ((m.x, x), (m.y, y)))
    ]
    return Series(series.name, kept, series.line, series.dotted, series.colour)


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    if axis.names:
        return Scale(-0.5, len(axis.names) - 0.5, start, end)
    low, high = min(values), max(values)
    if axis.log:
        margin = (high / low) ** 0.06 if high > low else 2.0
        return Scale(low / margin, high * margin, start, end, log=True)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Scale(0.0 if axis.zero and low >= 0 else low - margin, high + margin, start, end)


def _ticks(axis: Axis, scale: Scale) -> list[tuple[float, str]]:
    if axis.names:
        return list(enumerate(axis.names))
    if axis.ticks:
        return [(v, axis.show(v)) for v in axis.ticks if scale.low <= v <= scale.high]
    if axis.log:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        found = [k * 10.0**p for p in powers for k in (1, 2, 5) if scale.low <= k * 10.0**p <= scale.high]
        whole = [v for v in found if f"{v:e}".startswith("1.0")]
        found = whole if len(found) > 7 and len(whole) > 1 else found
        return [(v, axis.show(v)) for v in found]
    return [(v, axis.show(v)) for v in ticks_between(scale.low, scale.high)]


def _grid(x: Axis, y: Axis, across: Scale, up: Scale, bottom: float, height: float, crowded: bool) -> list[str]:
    parts = []
    for value, said in _ticks(y, up):
        place = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{place:.1f}" x2="{WIDTH - _RIGHT}" y2="{place:.1f}"/>')
        parts.append(_text(_LEFT - 8, place + 4, said, "end"))
    last = -math.inf
    for value, said in _ticks(x, across):
        place, half = across(value), _LETTER * len(said) / 2
        if crowded:
            words = escape(_cut(said, 24))
            turned = f'transform="translate({place + 4:.1f} {bottom + 14:g}) rotate(-35)" text-anchor="end"'
            parts.append(f"<text {turned}>{words}</text>")
        elif place - half > last:
            # Clear of the largest mark that lies on the axis.
            parts.append(_text(place, bottom + 23, said, "middle"))
            last = place + half + 4
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, height - 10, x.title, "middle", "axis"))
    parts.append(
        f'<text class="axis" transform="translate(14 {(_TOP + bottom) / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>"
    )
    return parts


def _drawn(series: Series, number: int, across: Scale, up: Scale) -> list[str]:
    parts, colour = [], f"s{number % 8}"
    if series.line and len(series.marks) > 1:
        path = " ".join(f"{across(m.x):.1f},{up(m.y):.1f}" for m in series.marks)
        parts.append(f'<polyline class="line {colour}{" dotted" * series.dotted}" points="{path}"/>')
    for mark in series.marks:
        kind = "faint" if mark.faint else colour
        px, py = across(mark.x), up(mark.y)
        drawn = ""
        if mark.low is not None and mark.high is not None:
            low = up(max(mark.low, up.low)) if up.log else up(mark.low)
            drawn += f'<path class="bar {kind}" d="M{px:.1f} {low:.1f}V{up(mark.high):.1f}"/>'
        ring = " hollow" * mark.hollow
        drawn += f'<circle class="mark {kind}{ring}" cx="{px:.1f}" cy="{py:.1f}" r="{mark.size:g}"/>'
        # A label that would run over the edge stands on the other side.
        if mark.label:
            fits = px + 9 + _LETTER * len(mark.label) < WIDTH
            drawn += _text(px + (9 if fits else -9), py - 6, mark.label, "start" if fits else "end", f"label {kind}")
        parts.append(_hover(drawn, mark.said))
    return parts


def _legend(series: Sequence[Series], top: float) -> tuple[list[str], int]:
    """Names beside their colours, and in how many lines; none where there is one name or less."""
    named = [(n, s) for n, s in enumerate(series) if s.name and s.marks]
    if len(named) < 2:
        return [], 0
    parts, x, line = [], 8.0, 1
    for number, one in named:
        colour = f"s{(one.colour if one.colour is not None else number) % 8}"
        name = _cut(one.name, 58)
        wide = _LETTER * len(name) + 30
        if x + wide > WIDTH and x > 8:
            x, line = 8.0, line + 1
        down = top + line * _LINE - 8
        parts.append(f'<circle class="mark {colour}" cx="{x + 5:g}" cy="{down - 4:g}" r="5"/>')
        parts.append(_text(x + 15, down, name, "start"))
        x += wide
    return parts, line


def _cut(said: str, letters: int) -> str:
    return said if len(said) <= letters else said[: max(1, letters - 1)] + "…"


def _hover(drawn: str, said: str) -> str:
    return f'<g class="told" data-told="{escape(said)}" tabindex="0">{drawn}</g>' if said else drawn


def _text(x: float, y: float, said: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'
