"""The Pareto picture: quality against sparsity and against speed, on one self-contained page, with its table beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from rich import box
from rich.table import Table

from laconic.engine.writer import write_text
from laconic.report.bench_table import markdown
from laconic.report.pareto import Point, as_csv, pareto_caption, pareto_rows
from laconic.report.plots import LAYOUT, fragments

_INK, _GREY = "#2f6f5e", "#c4c4bf"


def write_pareto(points: Sequence[Point], how: Mapping[str, Any], file: Path) -> list[Path]:
    """The page, and beside it the table as .md and .csv.

    Returns: all three. Raises: ValueError for a file that is no page.
    """
    if file.suffix not in (".html", ".htm"):
        raise ValueError(f"the report is a page of HTML; give {file} a name that ends in .html")
    environment = Environment(
        loader=PackageLoader("laconic.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    rows = pareto_rows(points)
    html = environment.get_template("pareto.html").render(
        headline=_headline(points),
        rows=list(zip(rows, points, strict=True)),
        columns=list(rows[0]),
        caption=pareto_caption(how),
        plot=fragments(pareto_plot(points))[0],
        commands=how["commands"],
        script=get_plotlyjs(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    table, numbers = file.with_suffix(".md"), file.with_suffix(".csv")
    write_text(file, html)
    commands = "```\n" + "\n".join(how["commands"]) + "\n```"
    write_text(table, f"{markdown(rows)}\n\n{pareto_caption(how)}.\n\n{commands}\n")
    write_text(numbers, as_csv(points))
    return [file, table, numbers]


def pareto_table(points: Sequence[Point], how: Mapping[str, Any]) -> Table:
    """For the terminal; what is dominated is dim."""
    rows = pareto_rows(points)
    table = Table(box=box.SIMPLE, caption=pareto_caption(how), caption_justify="left", pad_edge=False)
    for j, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if j else "left", overflow="fold")
    for row, point in zip(rows, points, strict=True):
        table.add_row(*row.values(), style="dim" if point.dominated else None)
    return table


def pareto_plot(points: Sequence[Point]) -> go.Figure:
    """KL by the share of weights that is gone, and by speed: with dense kernels hollow, with sparse ones filled, a
    line between the two. Markers grow with the file; what is dominated is grey."""
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    most = max(p.nbytes for p in points)
    for p in points:
        size, colour = 8 + 16 * p.nbytes / most, _GREY if p.dominated else _INK
        said = f"{p.name}<br>{p.nbytes / 1e6:.2f} MB, KL %{{y:.4f}}<br>%{{x}}<extra></extra>"
        look: dict[str, Any] = {"showlegend": False, "textfont": {"color": colour}, "hovertemplate": said}
        mark = {"size": size, "color": colour, "line": {"width": 2, "color": colour}}
        figure.add_scatter(
            x=[p.gone],
            y=[p.kl],
            mode="markers+text",
            text=[p.name],
            textposition="top center",
            marker=mark,
            row=1,
            col=1,
            **look,
        )
        speeds = [p.speed] if p.sparse_speed is None else [p.speed, p.sparse_speed]
        figure.add_scatter(
            x=speeds,
            y=[p.kl] * len(speeds),
            mode="markers+lines",
            line={"color": colour, "dash": "dot"},
            marker=mark | {"symbol": ["circle-open", "circle"][: len(speeds)]},
            row=1,
            col=2,
            **look,
        )
    for name, symbol in (("dense kernels", "circle-open"), ("sparse kernels", "circle")):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"symbol": symbol, "color": _INK, "size": 10}
        )
    figure.update_layout(title="Sparsity, quality and speed", **(LAYOUT | {"height": 460}))
    figure.update_yaxes(title="KL to the original (nats a token)", rangemode="tozero", col=1)
    figure.update_xaxes(title="share of linear weights that is gone", tickformat=".0%", col=1)
    figure.update_xaxes(title="decoding speed over the original's", ticksuffix="x", col=2)
    return figure


def _headline(points: Sequence[Point]) -> str:
    """The first thing to know."""
    artifacts = points[1:]
    kept = [p for p in artifacts if not p.dominated]
    fastest = max(artifacts, key=lambda p: p.best_speed)
    said = f"{len(kept)} of {len(artifacts)} artifacts are beaten by no other in KL, size and speed at once. "
    if fastest.best_speed < 1.03:
        return said + "None decodes faster than the original here."
    return (
        said
        + f"{fastest.name} decodes {fastest.best_speed:.2f} times as fast as the original, at a KL of {fastest.kl:.4f}."
    )
