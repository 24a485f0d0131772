"""Tables of a result of `laconic bench`, for the terminal, in Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from laconic.checkpoint.atomic import created_folder, write_text
from laconic.report.serving_table import serving_caption, serving_tables

Rows = list[dict[str, str]]


def bench_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the terminal tables of a result.

    Args:
        result: Result of `laconic bench`.
    """
    tables = []
    for title, rows in titled_rows(result):
        table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
        for j, column in enumerate(rows[0]):
            table.add_column(
                column,
                justify="right" if j else "left",
                no_wrap=j > 0 and column != "kernels",
                min_width=0 if j else 20,
            )
        for row in rows:
            table.add_row(*row.values())
        tables.append(table)
    return tables


def write_bench(result: Mapping[str, Any], file: Path) -> None:
    """Write a result to a file, atomically.

    Args:
        result: Result of `laconic bench`.
        file: A .json file gets the whole result; any other file gets Markdown tables with settings and command.
    """
    text = json.dumps(result, indent=2) if file.suffix == ".json" else _bench_markdown(result)
    with created_folder(file):
        write_text(file, text + "\n")


def _bench_markdown(result: Mapping[str, Any]) -> str:
    parts = [bench_caption(result), f"```\n{result['command']}\n```"]
    for title, rows in titled_rows(result):
        parts += [f"**{title}**", markdown(rows)]
    parts.append("\n".join(f"- {line}" for line in result["summary"]))
    return "\n\n".join(parts)


def titled_rows(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Return pairs of a title and formatted cells.

    Args:
        result: Result of `laconic bench serving`; or of `laconic bench sparsity`, which has one table per shape of
            linears, then one of whole models.
    """
    if "engine" in result:
        return serving_tables(result)
    tables: list[tuple[str, Rows]] = []
    linears = result.get("linears", [])
    for shape in dict.fromkeys(tuple(r["shape"]) for r in linears):
        rows = [r for r in linears if tuple(r["shape"]) == shape]
        is_unnamed = rows[0]["linear"] == f"{shape[0]}x{shape[1]}"
        title = "" if is_unnamed else f"{rows[0]['linear']} "
        title += f"{shape[0]} x {shape[1]}: speed-up over dense of the same dtype (milliseconds)"
        tables.append((title, [_form_cells(form, rows) for form in dict.fromkeys(r["form"] for r in rows)]))
    if models := result.get("models"):
        title = f"Whole models, {result['sequences']} x {result['prompt']} tokens: medians, in brackets the "
        title += "99th percentile; FLOPs and bytes of the linears per token; energy of prefill and decode"
        tables.append((title, [_model_cells(row) for row in models]))
    return tables


def bench_caption(result: Mapping[str, Any]) -> str:
    """Describe device, versions and settings of a result.

    Args:
        result: Result of `laconic bench`.

    Returns:
        The description, without a period at its end.
    """
    if "engine" in result:
        return serving_caption(result)
    text = f"{result['device_name']}, {result['threads']} threads, torch {result['versions']['torch']}"
    text += f", transformers {result['versions']['transformers']}, {result['dtype']}; medians of at most "
    text += f"{result['rounds']} rounds, each of which times every variant once"
    return text + ("; random weights" if result["random_weights"] else "")


def markdown(rows: Rows) -> str:
    """Return rows of cells as a Markdown table, with the first column aligned left.

    Args:
        rows: Rows of cells by column, at least one, all with the same columns.
    """
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def _form_cells(form: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    by_batch = {r["batch"]: r for r in rows if r["form"] == form}
    first = next(iter(by_batch.values()))
    size = next((f"{r['weight_bytes'] / 1e6:.3g} MB" for r in by_batch.values() if "weight_bytes" in r), "-")
    cells = {"form": form if "unavailable" not in first else f"{form} *", "weight": size}
    for batch, row in by_batch.items():
        cells[str(batch)] = "-" if "unavailable" in row else f"{_times(row['speedup'])} ({row['ms_p50']:.3g})"
    return cells


def _model_cells(row: Mapping[str, Any]) -> dict[str, str]:
    phases = {phase: row[phase] for phase in ("prefill", "decode")}
    joules = [p["joules_per_token"] for p in phases.values()]
    cells = {
        "model": row["name"],
        "removed": f"{row['gone']:.0%}",
        "MFLOP": f"{row['flops_per_token'] / 1e6:.4g}",
        "MB": f"{row['linear_bytes'] / 1e6:.4g}",
    }
    for phase, p in phases.items():
        rate = f"{_short(p['tokens_per_second'])} [{_short(p['tokens_per_second_p99'])}]"
        cells[f"{phase} tokens/s"] = f"{rate} {_times(p['speedup'])}"
    source = row["decode"]["energy_from"]
    cells["J/token"] = "not reported" if None in joules else f"{joules[0]:.3g}, {joules[1]:.3g} ({source})"
    return cells


def _short(number: float) -> str:
    """Format a number with three digits and without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x"
