"""The Pareto report: quality over sparsity and over speed on one HTML page, with Markdown and CSV tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from laconic.checkpoint.atomic import created_folder, write_text
from laconic.report.bench_table import markdown
from laconic.report.chart import Axis, Mark, Series, chart
from laconic.report.page import check_page, environment
from laconic.report.pareto import ParetoPoint, as_csv, pareto_caption, pareto_rows


def write_pareto(points: Sequence[ParetoPoint], settings: Mapping[str, Any], file: Path) -> list[Path]:
    """Write the page, and the table as .md and .csv beside it.

    Args:
        points: Points of `gather_points`.
        settings: Settings of `gather_points`.
        file: The HTML file.

    Returns:
        The three files.

    Raises:
        ValueError: The name of the file does not end in .html or .htm.
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
            caption=pareto_caption(settings),
            plots=pareto_plots(points),
            commands=settings["commands"],
        )
    )
    commands = "```\n" + "\n".join(settings["commands"]) + "\n```"
    contents = {
        file: html,
        file.with_suffix(".md"): f"{markdown(rows)}\n\n{pareto_caption(settings)}.\n\n{commands}\n",
        file.with_suffix(".csv"): as_csv(points),
    }
    with created_folder(file):
        for path, text in contents.items():
            write_text(path, text)
    return list(contents)


def pareto_table(points: Sequence[ParetoPoint], settings: Mapping[str, Any]) -> Table:
    """Return the table for a terminal, with dominated rows dimmed.

    Args:
        points: Points of `gather_points`.
        settings: Settings of `gather_points`.
    """
    rows = pareto_rows(points)
    table = Table(box=box.SIMPLE, caption=pareto_caption(settings), caption_justify="left", pad_edge=False)
    for j, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if j else "left", overflow="fold")
    for row, point in zip(rows, points, strict=True):
        table.add_row(*row.values(), style="dim" if point.dominated else None)
    return table


def pareto_plots(points: Sequence[ParetoPoint]) -> list[str]:
    """Draw KL over the fraction of removed weights, and KL over speed.

    In the second chart, hollow marks are speeds with dense kernels, filled marks speeds with sparse kernels, and a line
    joins the two of an artifact. The size of a mark grows with the weight files; dominated points are grey.

    Args:
        points: Points of `gather_points`.

    Returns:
        The charts as SVG; the first only where removed weights were counted.
    """
    largest = max(p.nbytes for p in points)
    kl = Axis("KL to the original (nats per token)", zero=True)

    def mark(p: ParetoPoint, x: float, detail: str, *, label: str = "", hollow: bool = False) -> Mark:
        tooltip = f"{p.name}: {p.nbytes / 1e6:.2f} MB, KL {p.kl:.4f}, {detail}"
        return Mark(x, p.kl, tooltip, label, faint=p.dominated, hollow=hollow, size=4 + 6 * p.nbytes / largest)

    removed = [mark(p, p.gone, f"{p.gone:.1%} removed", label=p.name) for p in points if p.gone is not None]
    by_removed = Axis("fraction of linear weights removed", show=lambda v: f"{v:.0%}")
    speeds = []
    for p in points:
        marks = [mark(p, p.speed, f"{p.speed:.2f}x with dense kernels", label=p.name, hollow=True)]
        if p.sparse_speed is not None:
            marks.append(mark(p, p.sparse_speed, f"{p.sparse_speed:.2f}x with sparse kernels"))
        speeds.append(Series("", marks, line=True, dotted=True, colour=7 if p.dominated else 0))
    by_speed = Axis("decoding speed relative to the original", show=lambda v: f"{v:g}x")
    sparsity = chart("Sparsity and quality", [Series("", removed, colour=0)], by_removed, kl, height=400)
    return [
        *([sparsity] if len(removed) > 1 else []),
        chart("Speed and quality (hollow: with dense kernels)", speeds, by_speed, kl, height=400),
    ]


def _headline(points: Sequence[ParetoPoint]) -> str:
    artifacts = points[1:]
    front = [p for p in artifacts if not p.dominated]
    fastest = max(artifacts, key=lambda p: p.best_speed)
    count = f"{len(front)} of {len(artifacts)} artifacts are Pareto-optimal in KL, size and speed. "
    if fastest.best_speed < 1.03:
        return count + "No artifact decodes faster than the original."
    return (
        count
        + f"{fastest.name} decodes {fastest.best_speed:.2f} times as fast as the original, at a KL of {fastest.kl:.4f}."
    )
