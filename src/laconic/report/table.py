"""Table of evaluations, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = ("artifact", "schemes", "size", "bits/weight", "perplexity", "KL mean / p99", "same top-1")


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a terminal table with one row per result of `laconic eval`.

    Args:
        results: Results of `laconic eval` on one text.
    """
    table = Table(box=box.SIMPLE, caption=caption(results), caption_justify="left", pad_edge=False)
    for column in COLUMNS:
        is_text = column in ("artifact", "schemes")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for result in results:
        table.add_row(*cells(result).values())
    return table


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the formatted cells of one result, by column.

    Args:
        result: Result of `laconic eval` on one text.
    """
    name = str(result["model"]).rstrip("/").rpartition("/")[2]
    schemes = ", ".join(f"{n} x {s}" for s, n in result["schemes"].items()) or "none"
    if result["simulated"]:
        schemes += " (simulated)"
    nbytes, original_bytes = result["file_bytes"], result.get("baseline_file_bytes")
    size = f"{nbytes / 1e6:.2f} MB" + (f", {original_bytes / nbytes:.2f}x smaller" if original_bytes else "")
    has_baseline = result["kl_mean"] is not None
    perplexity = f"{result['perplexity']:.3f}"
    values = (
        name,
        schemes,
        size,
        f"{result['bits_per_weight']:.2f}",
        f"{perplexity} (original {result['baseline_perplexity']:.3f})" if has_baseline else perplexity,
        f"{result['kl_mean']:.4f} / {result['kl_p99']:.3f}" if has_baseline else "-",
        f"{result['top1_agreement']:.1%}" if has_baseline else "-",
    )
    return dict(zip(COLUMNS, values, strict=True))


def caption(results: Sequence[Mapping[str, Any]]) -> str:
    """Describe the settings of the evaluations.

    Args:
        results: Results of `laconic eval` on one text.

    Returns:
        The different settings, in one line.
    """
    settings = {f"{r['text']}, {r['windows']} windows of {r['context_length']} tokens, {r['dtype']}" for r in results}
    return "measured on " + "; ".join(sorted(settings)) if settings else "not measured yet"
