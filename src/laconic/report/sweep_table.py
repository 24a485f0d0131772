"""Terminal tables of a study: its planned runs, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

_FIGURES = {
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("MB", "{:.2f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "kl_mean": ("KL", "{:.4f}"),
    "top1_agreement": ("same top-1", "{:.1%}"),
    "compress_seconds": ("seconds", "{:.1f}"),
}


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of results.

    Args:
        rows: Rows of `laconic.sweep.runner.sweep`.
    """
    axes = list(dict.fromkeys(key for row in rows for key in row["values"])) or ["methods"]
    has_several_texts = len({(row["text"], row["context_length"]) for row in rows if row["text"]}) > 1
    table = Table(box=box.SIMPLE, caption=_caption(rows), caption_justify="left", pad_edge=False)
    table.add_column("run", no_wrap=True)
    for axis in axes:
        table.add_column(axis, overflow="fold")
    if has_several_texts:
        table.add_column("text", overflow="fold")
    for title, _ in _FIGURES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row["run"][:6],
            *(_format_value(row["values"].get(axis)) if row["values"] else row["methods"] for axis in axes),
        ]
        cells += [f"{row['text'] or '-'}, {row['context_length'] or '-'}"] if has_several_texts else []
        if row["status"] == "done":
            table.add_row(*cells, *(_format_figure(row, name, template) for name, (_, template) in _FIGURES.items()))
        else:
            table.add_row(*cells, row["status"], *[""] * (len(_FIGURES) - 1), style="red")
    return table


def plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of `laconic sweep --dry-run`.

    Args:
        rows: Rows of `laconic.sweep.runner.dry_run`.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("variant", overflow="fold")
    table.add_column("state", overflow="fold")
    for title in ("MB", "smaller", "memory, MB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        figures = ["-"] * 3
        if "bytes_after" in row:
            before, after = row["bytes_before"], row["bytes_after"]
            figures = [f"{after / 1e6:.2f}", f"{before / after:.2f}x", f"{row['peak_bytes'] / 1e6:.0f}"]
        problem = row.get("problem")
        table.add_row(row["run"][:6], row["name"], f"will fail: {problem}" if problem else row["state"], *figures)
    return table


def plan_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Summarize how many runs remain, and estimate their time from the runs that are done.

    Args:
        rows: Rows of `laconic.sweep.runner.dry_run`.

    Returns:
        The summary, in one line.
    """
    pending = [row for row in rows if row["state"] != "done"]
    count = f"{len(rows)} runs, {len(rows) - len(pending)} done, {len(pending)} to do"
    if not pending or pending[0]["seconds"] is None:
        return count
    minutes = len(pending) * pending[0]["seconds"] / 60
    return f"{count}: about {minutes:.0f} minutes one after another, estimated from the runs that are done"


def _format_value(value: Any) -> str:
    return "-" if value is None else str(value)


def _format_figure(row: Mapping[str, Any], name: str, template: str) -> str:
    value = row[name]
    return "-" if value is None else template.format(value / 1e6 if name == "file_bytes" else value)


def _caption(rows: Sequence[Mapping[str, Any]]) -> str | None:
    originals = {
        f"{row['original']}: perplexity {row['baseline_perplexity']:.3f} on {row['text']}, {row['windows']} windows of "
        f"{row['context_length']} tokens, {row['dtype']}"
        for row in rows
        if row["baseline_perplexity"] is not None
    }
    return "; ".join(sorted(originals)) or None
