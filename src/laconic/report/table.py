"""The table of results on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS = (
    "artifact",
    "schemes",
    "size",
    "bits/weight",
    "perplexity",
    "original",
    "KL mean",
    "KL p99",
    "top-1 same",
)


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a result of `laconic eval`."""
    table = Table(caption=caption(results), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("artifact", "schemes") else "right")
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
    size = f"{ours / 1e6:.2f} MB" + (f" ({theirs / ours:.2f}x)" if theirs else "")
    values = (
        name,
        schemes,
        size,
        f"{result['bits_per_weight']:.2f}",
        f"{result['perplexity']:.3f}",
        _number(result["baseline_perplexity"], ".3f"),
        _number(result["kl_mean"], ".4f"),
        _number(result["kl_p99"], ".3f"),
        _number(result["top1_agreement"], ".1%"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def caption(results: Sequence[Mapping[str, Any]]) -> str:
    """On what the results were measured."""
    kinds = sorted(
        {f"{r['text']}, {r['windows']} windows of {r['context_length']} tokens, {r['dtype']}" for r in results}
    )
    return "measured on " + "; ".join(kinds) if kinds else "nothing was measured yet"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
