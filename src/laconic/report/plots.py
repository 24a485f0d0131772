"""Plots for the page, by plotly, as HTML fragments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

if TYPE_CHECKING:
    from laconic.report.page import Evaluated

LAYOUT = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "color": "#7a7a7a"},
    "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
    "height": 380,
    "legend": {"orientation": "h", "y": -0.25},
}


def size_plot(results: Sequence[dict[str, Any]]) -> go.Figure | None:
    """Bits per weight against KL to the original; None when nothing was compared."""
    compared = [r for r in results if r["kl_mean"] is not None]
    if not compared:
        return None
    names = [str(r["model"]).rstrip("/").rpartition("/")[2] for r in compared]
    figure = go.Figure(
        go.Scatter(
            x=[r["bits_per_weight"] for r in compared],
            y=[r["kl_mean"] for r in compared],
            text=names,
            mode="markers+text",
            textposition="top center",
            marker={"size": 10},
            hovertemplate="%{text}<br>%{x:.2f} bits per weight<br>KL %{y:.4f}<extra></extra>",
        )
    )
    figure.update_layout(title="Size and fidelity", **LAYOUT)
    figure.update_xaxes(title="bits per weight, whole model")
    figure.update_yaxes(title="KL to the original (nats a token)", rangemode="tozero")
    return figure


def error_plot(artifacts: Sequence[Evaluated]) -> go.Figure | None:
    """Relative error of every linear, in the order of the walk; None when no log is there."""
    figure = go.Figure()
    for a in artifacts:
        events = [e for e in a.log if e.get("event") == "linear"]
        if events:
            errors = [e.get("output_error", e["weight_error"]) for e in events]
            figure.add_scatter(
                x=list(range(len(events))),
                y=errors,
                name=a.path.name,
                text=[e["linear"] for e in events],
                mode="lines+markers",
                hovertemplate="%{text}<br>%{y:.2e}<extra></extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(title="Error of each linear", showlegend=len(figure.data) > 1, **LAYOUT)
    figure.update_xaxes(title="linear, from the first block to the last")
    figure.update_yaxes(title="relative squared error", type="log", exponentformat="power")
    return figure


def fragments(*figures: go.Figure | None) -> list[str]:
    """The figures that are there, as HTML; the page brings plotly's script."""
    config = {"displayModeBar": False, "responsive": True}
    return [str(f.to_html(full_html=False, include_plotlyjs=False, config=config)) for f in figures if f is not None]
