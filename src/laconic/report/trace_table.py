"""Table of time and memory by span."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from laconic.bench.trace import Row


def trace_table(rows: Sequence[Row]) -> Table:
    """Return a terminal table with one row per span; nested spans are indented below their parent.

    Args:
        rows: Rows of `bench.trace.read_trace` or `merge_blocks`.
    """
    table = Table(box=None, header_style="bold")
    gpu, memory = any(r.gpu_seconds is not None for r in rows), any(r.peak_bytes is not None for r in rows)
    table.add_column("span")
    for title in ["calls", "seconds", "share", "self seconds", *["GPU s"] * gpu, *["peak MB"] * memory]:
        table.add_column(title, justify="right")
    total = sum(r.seconds for r in rows if len(r.path) == 1)
    for row in _nested(rows):
        cells = [
            "  " * (len(row.path) - 1) + row.path[-1],
            str(row.count),
            f"{row.seconds:.3f}",
            f"{row.seconds / total:.0%}" if total else "",
            f"{row.own_seconds:.3f}",
        ]
        if gpu:
            cells.append("" if row.gpu_seconds is None else f"{row.gpu_seconds:.3f}")
        if memory:
            cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}")
        table.add_row(*cells)
    return table


def _nested(rows: Sequence[Row]) -> list[Row]:
    """Sort spans below their parents, in order of first appearance."""
    first = {row.path: i for i, row in enumerate(rows)}
    return sorted(rows, key=lambda r: [first.get(r.path[: k + 1], 0) for k in range(len(r.path))])
