"""Charts of a result of `laconic eval long`: heat maps of needles, curves over the context length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.report.chart import Axis, Cells, Mark, Series, chart, heat_chart


def long_plots(result: Mapping[str, Any]) -> list[str]:
    """Draw a chart of every part that the result has.

    Args:
        result: Result of `laconic eval long`.

    Returns:
        The charts as SVG.
    """
    charts = [needle_map(result, name) for name in result["caches"]] if "needle" in result else []
    charts += [_draw_curve(result, curve) for curve in _CURVES if curve.part in result]
    return [c for c in charts if c]


def needle_map(result: Mapping[str, Any], cache: str) -> str:
    """Draw the fraction of needles found through one cache, by depth and context length.

    Args:
        result: Result of `laconic eval long` with needles.
        cache: Name of the cache, one of `caches` of the result.

    Returns:
        A heat map as SVG.
    """
    cells: dict[tuple[float, int], Mapping[str, Any]] = {(c["depth"], c["length"]): c for c in result["needle"][cache]}
    depths = list(dict.fromkeys(depth for depth, _ in cells))
    lengths = list(dict.fromkeys(length for _, length in cells))

    def cell(row: int, column: int) -> Mapping[str, Any]:
        return cells[depths[row], lengths[column]]

    contents = Cells(
        level=lambda i, j: cell(i, j)["found"] / cell(i, j)["trials"],
        tooltip=lambda i, j: (
            f"{lengths[j]} tokens, depth {depths[i]:.0%}: {cell(i, j)['found']} of {cell(i, j)['trials']}"
        ),
        text=lambda i, j: f"{cell(i, j)['found']}/{cell(i, j)['trials']}",
    )
    columns, rows = [str(n) for n in lengths], [f"{d:.0%}" for d in depths]
    return heat_chart(f"Needles found, {cache}", columns, rows, contents, across="tokens", down="depth of the needle")


def _bytes(value: float) -> str:
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{value / size:g} {unit}" for unit, size in units if value >= size), f"{value:g} B")


@dataclass(frozen=True)
class _Curve:
    """A chart over tokens with one line per cache.

    Attributes:
        part: Part of the result.
        position: Key of the number of tokens.
        value: Key of the value.
        title: Title of the chart.
        y: Vertical axis.
        skips_last: Whether the last of several rows is the whole window, and not a position.
    """

    part: str
    position: str
    value: str
    title: str
    y: Axis
    skips_last: bool = False


_CURVES = (
    _Curve("perplexity", "stop", "perplexity", "Perplexity by position", Axis("perplexity"), skips_last=True),
    _Curve(
        "perplexity", "stop", "kl_mean", "KL to the 16-bit cache", Axis("nats per token", zero=True), skips_last=True
    ),
    _Curve("memory", "length", "request_bytes", "Bytes per request", Axis("bytes", log=True, show=_bytes)),
    _Curve("speed", "length", "tokens_per_second", "Decoding", Axis("tokens per second", zero=True)),
)


def _draw_curve(result: Mapping[str, Any], curve: _Curve) -> str:
    series = []
    for name in result["caches"]:
        rows: Sequence[Mapping[str, Any]] = result[curve.part][name]
        shown = rows[:-1] if curve.skips_last and len(rows) > 1 else rows
        points = [(row[curve.position], row[curve.value]) for row in shown]
        marks = [Mark(x, y, f"{name}, {x} tokens: {y:.4g}") for x, y in points]
        series.append(Series(name, marks, line=True))
    ticks = sorted({m.x for s in series for m in s.marks})
    return chart(curve.title, series, Axis("tokens", log=ticks[-1] > ticks[0] > 0, ticks=ticks), curve.y)
