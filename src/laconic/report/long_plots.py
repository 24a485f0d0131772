"""Plots of a result of `laconic eval --suite long`: heat maps of needles, curves over the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart, heat


def long_plots(result: Mapping[str, Any]) -> list[str]:
    """The pictures of what was measured."""
    made = [needle_map(result, name) for name in result["caches"]] if "needle" in result else []
    if "perplexity" in result:
        made.append(
            _curves(result, "perplexity", "stop", "perplexity", "Perplexity by position", Axis("perplexity"), -1)
        )
        made.append(
            _curves(
                result, "perplexity", "stop", "kl_mean", "KL to the 16-bit cache", Axis("nats a token", zero=True), -1
            )
        )
    if "memory" in result:
        y = Axis("bytes", log=True, show=_bytes)
        made.append(_curves(result, "memory", "length", "request_bytes", "Bytes of a request", y))
    if "speed" in result:
        y = Axis("tokens a second", zero=True)
        made.append(_curves(result, "speed", "length", "tokens_per_second", "Decoding", y))
    return [m for m in made if m]


def needle_map(result: Mapping[str, Any], cache: str) -> str:
    """The share of needles that was found through a cache, depth by length."""
    cells: dict[tuple[float, int], Mapping[str, Any]] = {(c["depth"], c["length"]): c for c in result["needle"][cache]}
    depths = list(dict.fromkeys(depth for depth, _ in cells))
    lengths = list(dict.fromkeys(length for _, length in cells))

    def of(row: int, column: int) -> Mapping[str, Any]:
        return cells[depths[row], lengths[column]]

    return heat(
        f"Needles found, {cache}",
        [str(n) for n in lengths],
        [f"{d:.0%}" for d in depths],
        lambda i, j: of(i, j)["found"] / of(i, j)["trials"],
        lambda i, j: f"{lengths[j]} tokens, depth {depths[i]:.0%}: {of(i, j)['found']} of {of(i, j)['trials']}",
        words=lambda i, j: f"{of(i, j)['found']}/{of(i, j)['trials']}",
        across="tokens",
        down="depth of the needle",
    )


def _curves(
    result: Mapping[str, Any], part: str, at: str, value: str, title: str, y: Axis, stop: int | None = None
) -> str:
    """One line a cache, over tokens. stop: how many of the rows are drawn."""
    series = []
    for name in result["caches"]:
        rows: Sequence[Mapping[str, Any]] = result[part][name]
        shown = rows[:stop] if len(rows) > 1 else rows
        marks = [Mark(r[at], r[value], f"{name}, {r[at]} tokens: {r[value]:.4g}") for r in shown]
        series.append(Series(name, marks, line=True))
    ticks = sorted({m.x for s in series for m in s.marks})
    return chart(title, series, Axis("tokens", log=ticks[-1] > ticks[0] > 0, ticks=ticks), y)


def _bytes(value: float) -> str:
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{value / size:g} {unit}" for unit, size in units if value >= size), f"{value:g} B")
