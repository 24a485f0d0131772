"""Terminal table of generated text, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def samples_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """Return a table with one row per prompt: the prompt, the text of the original (if any), and of the artifact.

    Args:
        samples: Samples of a result, at least one, with `prompt`, `written` and, if there is an original, `original`.
    """
    names = [name for name in ("prompt", "original", "written") if name in samples[0]]
    table = Table(box=box.SIMPLE, show_lines=True, pad_edge=False)
    for name in names:
        table.add_column({"prompt": "prompt", "original": "original", "written": "compressed"}[name], ratio=1)
    for sample in samples:
        # Text() keeps brackets in generated text from being read as markup.
        table.add_row(*(Text(sample[name].strip()) for name in names))
    return table
