"""Plots of a result of `laconic eval --suite long`: heat maps of needles, curves over the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from laconic.report.plots import LAYOUT

# From nothing found to everything, told apart without red and green.
_COLOURS = [[0, "#b5472f"], [0.5, "#ead9a8"], [1, "#2f6f5e"]]


def long_plots(result: Mapping[str, Any]) -> list[go.Figure]:
    """The figures of what was measured."""
    made = [needle_plot(result)] if "needle" in result else []
    if "perplexity" in result:
        made.append(_curves(result, "perplexity", lambda b: b["stop"], "perplexity", "Perplexity by position", -1))
        made.append(_curves(result, "perplexity", lambda b: b["stop"], "kl_mean", "KL to the 16-bit cache", -1))
        made[-1].update_yaxes(title="nats a token")
    if "memory" in result:
        made.append(_curves(result, "memory", lambda m: m["length"], "request_bytes", "Bytes of a request"))
        made[-1].update_yaxes(type="log", exponentformat="SI")
    if "speed" in result:
        made.append(_curves(result, "speed", lambda s: s["length"], "tokens_per_second", "Decoding, tokens a second"))
    return made


def needle_plot(result: Mapping[str, Any]) -> go.Figure:
    """A heat map for each cache: the share of needles found, depth by length."""
    names = result["caches"]
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names, shared_yaxes=True)
    for i, name in enumerate(names, 1):
        cells = result["needle"][name]
        lengths = list(dict.fromkeys(c["length"] for c in cells))
        depths = list(dict.fromkeys(c["depth"] for c in cells))
        share = {(c["length"], c["depth"]): c["found"] / c["trials"] for c in cells}
        figure.add_trace(
            go.Heatmap(
                x=[str(n) for n in lengths],
                y=[f"{d:.0%}" for d in depths],
                z=[[share[length, depth] for length in lengths] for depth in depths],
                zmin=0,
                zmax=1,
                colorscale=_COLOURS,
                colorbar={"tickformat": ".0%", "title": "found"},
                showscale=i == len(names),
                xgap=2,
                ygap=2,
                hovertemplate="%{x} tokens, depth %{y}: %{z:.0%}<extra></extra>",
            ),
            row=1,
            col=i,
        )
    figure.update_layout(title="Needles found", **LAYOUT)
    figure.update_xaxes(title="tokens")
    # The beginning of the text is at the top.
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title="depth", col=1)
    return figure


def _curves(
    result: Mapping[str, Any],
    part: str,
    at: Callable[[Mapping[str, Any]], int],
    value: str,
    title: str,
    stop: int | None = None,
) -> go.Figure:
    """One line a cache, over tokens. stop: how many of the rows are drawn."""
    figure = go.Figure()
    for name in result["caches"]:
        rows: Sequence[Mapping[str, Any]] = result[part][name]
        shown = rows[:stop] if len(rows) > 1 else rows
        figure.add_scatter(x=[at(r) for r in shown], y=[r[value] for r in shown], name=name, mode="lines+markers")
    figure.update_layout(title=title, showlegend=True, **LAYOUT)
    figure.update_xaxes(title="tokens", type="log", tickvals=_ticks(result, part, at))
    return figure


def _ticks(result: Mapping[str, Any], part: str, at: Callable[[Mapping[str, Any]], int]) -> list[int]:
    return sorted({at(row) for rows in result[part].values() for row in rows})
