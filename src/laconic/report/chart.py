"""SVG charts: a few kilobytes each, without scripts, coloured by the page (also in dark mode), with tooltips.

Plotly's script alone takes 4.5 MB per page, more than all results of a study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

# All lengths are in SVG units. A phone draws charts at three quarters of this width, where text is still readable.
WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 40, 50
_LETTER, _LINE = 7, 20
# Letter width of row labels in a heat map: letters are larger on a phone, and there is no space beyond the edge.
_LARGE = 8


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: Horizontal value.
        y: Vertical value.
        tooltip: Text shown on hover and focus.
        label: Text beside the point.
        low: Lower end of the error bar.
        high: Upper end of the error bar.
        faint: Draw in grey, behind other points.
        hollow: Draw a ring instead of a disc.
        size: Radius.
    """

    x: float
    y: float
    tooltip: str
    label: str = ""
    low: float | None = None
    high: float | None = None
    faint: bool = False
    hollow: bool = False
    size: float = 5.0


@dataclass(frozen=True)
class Series:
    """A series of points in one colour.

    Attributes:
        name: Name for the legend; empty for a series without one.
        marks: The points.
        line: Join the points by a line.
        dotted: Draw the line dotted.
        colour: Index of the colour; None for the index of the series.
    """

    name: str
    marks: Sequence[Mark]
    line: bool = False
    dotted: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
        title: Title.
        log: Logarithmic scale; values that are not positive are omitted.
        zero: Start at zero.
        show: Function from a tick value to its label.
        ticks: Positions of ticks; empty for round numbers.
        names: Names of categories, which lie at 0, 1, 2, ...
    """

    title: str
    log: bool = False
    zero: bool = False
    show: Callable[[float], str] = lambda v: f"{v:g}"
    ticks: Sequence[float] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Scale:
    """Map from a value between `low` and `high` to a coordinate between `start` and `end`.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Coordinate of `low`.
        end: Coordinate of `high`.
        log: Logarithmic scale.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (v - low) / (high - low)


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 340) -> str:
    """Draw points and lines over two axes.

    Args:
        title: Title of the chart.
        series: The series; points that are not finite, or not positive on a logarithmic axis, are omitted.
        x: Horizontal axis.
        y: Vertical axis.
        height: Height without the legend.

    Returns:
        The SVG; empty if there is no point.
    """
    shown = [_drawable(s, x, y) for s in series]
    marks = [m for s in shown for m in s.marks]
    if not marks:
        return ""
    across = _scale([m.x for m in marks], x, _LEFT, WIDTH - _RIGHT)
    ends = [v for m in marks for v in (m.low, m.high) if v is not None and (v > 0 or not y.log)]
    legend, lines = _legend(shown, height)
    # Long category names are rotated so that they do not overlap.
    longest = max((len(n) for n in x.names), default=0)
    crowded = longest * _LETTER * len(x.names) > WIDTH - _LEFT - _RIGHT
    bottom = height - _BOTTOM - (min(90, longest * 4) if crowded else 0)
    up = _scale([*(m.y for m in marks), *ends], y, bottom, _TOP)
    frame = _Frame(x, y, across, up, bottom, height, crowded)
    parts = [*_grid(frame), _text(0, 18, _shorten(title, 56), "start", "title")]
    # Series with faint points are drawn first, below the others.
    for number, one in sorted(enumerate(shown), key=lambda pair: not any(m.faint for m in pair[1].marks)):
        parts += _draw_series(one, one.colour if one.colour is not None else number, across, up)
    return svg(title, height + lines * _LINE, [*parts, *legend])


@dataclass(frozen=True)
class Cells:
    """Contents of the cells of a heat map; every function takes the indices of a row and a column.

    Attributes:
        level: Shade from 0 to 1; None where there is no cell.
        tooltip: Text shown on hover and focus.
        text: Text in the cell.
    """

    level: Callable[[int, int], float | None]
    tooltip: Callable[[int, int], str]
    text: Callable[[int, int], str] = lambda _row, _column: ""


def heat_chart(
    title: str, columns: Sequence[str], rows: Sequence[str], cells: Cells, *, across: str = "", down: str = ""
) -> str:
    """Draw a heat map.

    Args:
        title: Title of the map.
        columns: Labels of the columns.
        rows: Labels of the rows.
        cells: Contents of the cells.
        across: Meaning of the columns, for the legend.
        down: Meaning of the rows, for the legend.

    Returns:
        The SVG.
    """
    left = min(170, 16 + _LARGE * max(len(r) for r in rows))
    wide = max(4.0, min(64.0, (WIDTH - left - _RIGHT) / len(columns)))
    tall = 22
    parts = [_text(0, 18, _shorten(title, 56), "start", "title")]
    for i, row in enumerate(rows):
        top = _TOP + i * tall
        parts.append(_text(left - 8, top + 15, _shorten(row, (left - 8) // _LARGE), "end"))
        for j in range(len(columns)):
            level = cells.level(i, j)
            if level is not None:
                box = f'x="{left + j * wide:.1f}" y="{top}" width="{max(1.0, wide - 1):.1f}" height="{tall - 1}"'
                cell = f'<rect class="cell" {box} style="--level:{min(1.0, max(0.0, level)):.3f}"/>'
                inside = cells.text(i, j)
                if inside:
                    cell += _text(
                        left + (j + 0.5) * wide, top + 15, inside, "middle", "inside on" if level > 0.5 else "inside"
                    )
                parts.append(_hover(cell, cells.tooltip(i, j)))
    bottom = _TOP + len(rows) * tall
    step = max(1, math.ceil(len(columns) * (_LETTER * max(len(c) for c in columns) + 8) / (WIDTH - left - _RIGHT)))
    for j in range(0, len(columns), step):
        parts.append(_text(left + (j + 0.5) * wide, bottom + 16, columns[j], "middle"))
    legend = "; ".join(f"{name}: {meaning}" for name, meaning in (("columns", across), ("rows", down)) if meaning)
    parts.append(_text(0, bottom + 36, legend, "start"))
    return svg(title, bottom + 44, parts)


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    """Return an SVG image of a width of `WIDTH` from its parts.

    Args:
        title: Label of the image for screen readers; it is escaped.
        height: Height in units of the viewBox.
        parts: SVG elements; empty ones are skipped.
    """
    inside = "\n".join(part for part in parts if part)
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">\n{inside}\n</svg>'
    )


def standalone(image: str) -> str:
    """Return a chart as an SVG file, with style sheet and background.

    Args:
        image: A chart of `svg`.
    """
    style = files("laconic.report").joinpath("templates/chart.css").read_text(encoding="utf-8")
    head, _, rest = image.partition(">")
    return f'{head}>\n<style>\n{style}</style>\n<rect width="100%" height="100%" fill="var(--paper)"/>{rest}\n'


def stacked(charts: Sequence[str]) -> str:
    """Return one SVG image of several charts, one below another.

    Args:
        charts: Charts of `svg`.
    """
    parts, top = [], 0.0
    for one in charts:
        height = float(one.partition(f'viewBox="0 0 {WIDTH} ')[2].partition('"')[0])
        inside = one.removeprefix('<svg class="chart"')
        parts.append(f'<svg y="{top:g}" width="{WIDTH}" height="{height:g}"{inside}')
        top += height
    return svg("", top, parts)


def ticks_between(low: float, high: float, count: int = 5) -> list[float]:
    """Return at most about `count` round numbers from `low` to `high`.

    Args:
        low: Lower end of an axis.
        high: Upper end; `low` is the only tick if this is not larger.
        count: Largest number of steps between ticks.
    """
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= count)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    marks = [
        m for m in series.marks if all(math.isfinite(v) and (v > 0 or not axis.log) for v, axis in ((m.x, x), (m.y, y)))
    ]
    return Series(series.name, marks, series.line, series.dotted, series.colour)


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
        ticks = [k * 10.0**p for p in powers for k in (1, 2, 5) if scale.low <= k * 10.0**p <= scale.high]
        powers_only = [v for v in ticks if f"{v:e}".startswith("1.0")]
        ticks = powers_only if len(ticks) > 7 and len(powers_only) > 1 else ticks
        return [(v, axis.show(v)) for v in ticks]
    return [(v, axis.show(v)) for v in ticks_between(scale.low, scale.high)]


@dataclass(frozen=True)
class _Frame:
    """Axes of a chart with their scales, the coordinate of the horizontal axis, and the height."""

    x: Axis
    y: Axis
    across: Scale
    up: Scale
    bottom: float
    height: float
    crowded: bool


def _grid(frame: _Frame) -> list[str]:
    parts = []
    bottom = frame.bottom
    for value, label in _ticks(frame.y, frame.up):
        py = frame.up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{py:.1f}" x2="{WIDTH - _RIGHT}" y2="{py:.1f}"/>')
        parts.append(_text(_LEFT - 8, py + 4, label, "end"))
    last = -math.inf
    for value, label in _ticks(frame.x, frame.across):
        px, half = frame.across(value), _LETTER * len(label) / 2
        if frame.crowded:
            rotation = f'transform="translate({px + 4:.1f} {bottom + 14:g}) rotate(-35)" text-anchor="end"'
            parts.append(f"<text {rotation}>{escape(_shorten(label, 24))}</text>")
        elif px - half > last:
            # The offset leaves space for the largest mark on the axis.
            parts.append(_text(px, bottom + 23, label, "middle"))
            last = px + half + 4
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, frame.height - 10, frame.x.title, "middle", "axis"))
    parts.append(
        f'<text class="axis" transform="translate(14 {(_TOP + bottom) / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(frame.y.title)}</text>"
    )
    return parts


def _draw_series(series: Series, number: int, across: Scale, up: Scale) -> list[str]:
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
        # A label that would cross the right edge goes to the left of its mark.
        if mark.label:
            fits = px + 9 + _LETTER * len(mark.label) < WIDTH
            drawn += _text(px + (9 if fits else -9), py - 6, mark.label, "start" if fits else "end", f"label {kind}")
        parts.append(_hover(drawn, mark.tooltip))
    return parts


def _legend(series: Sequence[Series], top: float) -> tuple[list[str], int]:
    """Return the parts of a legend and its number of lines; empty for fewer than two names."""
    named = [(n, s) for n, s in enumerate(series) if s.name and s.marks]
    if len(named) < 2:
        return [], 0
    parts, x, line = [], 8.0, 1
    for number, one in named:
        colour = f"s{(one.colour if one.colour is not None else number) % 8}"
        name = _shorten(one.name, 58)
        wide = _LETTER * len(name) + 30
        if x + wide > WIDTH and x > 8:
            x, line = 8.0, line + 1
        down = top + line * _LINE - 8
        parts.append(f'<circle class="mark {colour}" cx="{x + 5:g}" cy="{down - 4:g}" r="5"/>')
        parts.append(_text(x + 15, down, name, "start"))
        x += wide
    return parts, line


def _shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _hover(drawn: str, tooltip: str) -> str:
    return f'<g class="hoverable" data-tooltip="{escape(tooltip)}" tabindex="0">{drawn}</g>' if tooltip else drawn


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text{css} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
