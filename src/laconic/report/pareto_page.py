"""The Pareto picture: quality against sparsity and against speed, on one self-contained page, with its table beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from laconic.checkpoint.atomic import write_text
from laconic.report.bench_table import markdown
from laconic.report.chart import Axis, Mark, Series, chart
from laconic.report.page import check_page, environment
from laconic.report.pareto import Point, as_csv, pareto_caption, pareto_rows


def write_pareto(points: Sequence[Point], how: Mapping[str, Any], file: Path) -> list[Path]:
    """The page, and beside it the table as .md and .csv.

    Returns: all three. Raises: ValueError for a file that is no page.
    """
    check_page(file)
    rows = pareto_rows(points)
    html = (
        environment()
        .get_template("pareto.html")
        .render(
            headline=_headline(points),
            rows=list(zip(rows, points, strict=True)),
            columns=list(rows[0]),
            caption=pareto_caption(how),
            plots=pareto_plots(points),
            commands=how["commands"],
        )
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


def pareto_plots(points: Sequence[Point]) -> list[str]:
    """KL by the share of weights that is gone, and by speed: with dense kernels hollow, with sparse ones filled, a
    line between the two. Markers grow with the file; what is dominated is grey."""
    most = max(p.nbytes for p in points)
    kl = Axis("KL to the original (nats a token)", zero=True)

    def mark(p: Point, x: float, said: str, *, label: str = "", hollow: bool = False) -> Mark:
        told = f"{p.name}: {p.nbytes / 1e6:.2f} MB, KL {p.kl:.4f}, {said}"
        return Mark(x, p.kl, told, label, faint=p.dominated, hollow=hollow, size=4 + 6 * p.nbytes / most)

    gone = [mark(p, p.gone, f"{p.gone:.1%} gone", label=p.name) for p in points]
    by_gone = Axis("share of linear weights that is gone", show=lambda v: f"{v:.0%}")
    speeds = []
    for p in points:
        marks = [mark(p, p.speed, f"{p.speed:.2f}x with dense kernels", label=p.name, hollow=True)]
        if p.sparse_speed is not None:
            marks.append(mark(p, p.sparse_speed, f"{p.sparse_speed:.2f}x with sparse kernels"))
        speeds.append(Series("", marks, line=True, dotted=True, colour=7 if p.dominated else 0))
    by_speed = Axis("decoding speed over the original's", show=lambda v: f"{v:g}x")
    return [
        chart("Sparsity and quality", [Series("", gone, colour=0)], by_gone, kl, height=400),
        chart("Speed and quality (hollow: with dense kernels)", speeds, by_speed, kl, height=400),
    ]


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
