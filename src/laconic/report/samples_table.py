"""What models wrote, side by side on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def samples_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """One row an opening: it, what the original wrote to it where there is one, what the compressed model wrote."""
    names = [name for name in ("prompt", "original", "written") if name in samples[0]]
    table = Table(box=box.SIMPLE, show_lines=True, pad_edge=False)
    for name in names:
        table.add_column({"prompt": "opening", "original": "original", "written": "compressed"}[name], ratio=1)
    for sample in samples:
        # Brackets in what a model writes are no markup.
        table.add_row(*(Text(sample[name].strip()) for name in names))
    return table
