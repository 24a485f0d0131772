"""Where time and memory went, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from laconic.bench.trace import Row


def trace_table(rows: Sequence[Row]) -> Table:
    """A line a path; what is within another is indented below it."""
    table = Table(box=None, header_style="bold")
    gpu, memory = any(r.gpu_seconds is not None for r in rows), any(r.peak_bytes is not None for r in rows)
    table.add_column("where")
    for title in ["times", "seconds", "share", "outside of what is below", *["GPU s"] * gpu, *["peak MB"] * memory]:
        table.add_column(title, justify="right")
    whole = sum(r.seconds for r in rows if len(r.path) == 1)
    for row in _nested(rows):
        cells = [
            "  " * (len(row.path) - 1) + row.path[-1],
            str(row.count),
            f"{row.seconds:.3f}",
            f"{row.seconds / whole:.0%}" if whole else "",
            f"{row.own_seconds:.3f}",
        ]
        if gpu:
            cells.append("" if row.gpu_seconds is None else f"{row.gpu_seconds:.3f}")
        if memory:
            cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}")
        table.add_row(*cells)
    return table


def _nested(rows: Sequence[Row]) -> list[Row]:
    """Each below what it is in, in order of first appearance."""
    first = {row.path: i for i, row in enumerate(rows)}
    return sorted(rows, key=lambda r: [first.get(r.path[: k + 1], 0) for k in range(len(r.path))])
