"""The table of results, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = ("artifact", "schemes", "size", "bits/weight", "perplexity", "KL mean / p99", "same top-1")


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a result of `laconic eval`."""
    table = Table(box=box.SIMPLE, caption=caption(results), caption_justify="left", pad_edge=False)
    for column in COLUMNS:
        words = column in ("artifact", "schemes")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for result in results:
        table.add_row(*cells(result).values())
    return table


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The formatted cells of one result, by column."""
    name = str(result["model"]).rstrip("/").rpartition("/")[2]
    schemes = ", ".join(f"{n} x {s}" for s, n in result["schemes"].items()) or "none"
    if result["simulated"]:
        schemes += " (simulated)"
    ours, theirs = result["file_bytes"], result.get("baseline_file_bytes")
    size = f"{ours / 1e6:.2f} MB" + (f", {theirs / ours:.2f}x less" if theirs else "")
    compared = result["kl_mean"] is not None
    perplexity = f"{result['perplexity']:.3f}"
    values = (
        name,
        schemes,
        size,
        f"{result['bits_per_weight']:.2f}",
        f"{perplexity} (was {result['baseline_perplexity']:.3f})" if compared else perplexity,
        f"{result['kl_mean']:.4f} / {result['kl_p99']:.3f}" if compared else "-",
        f"{result['top1_agreement']:.1%}" if compared else "-",
    )
    return dict(zip(COLUMNS, values, strict=True))


def caption(results: Sequence[Mapping[str, Any]]) -> str:
    """On what the results were measured."""
    kinds = {f"{r['text']}, {r['windows']} windows of {r['context_length']} tokens, {r['dtype']}" for r in results}
    return "measured on " + "; ".join(sorted(kinds)) if kinds else "nothing was measured yet"
