"""Table of task results, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def tasks_table(result: Mapping[str, Any]) -> Table:
    """Return a terminal table with one row per task metric of a result of `laconic eval tasks`.

    Args:
        result: Result of `laconic eval tasks`.
    """
    table = Table(box=box.SIMPLE, caption=tasks_caption(result), caption_justify="left", pad_edge=False)
    rows = task_rows(result)
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i > 1 else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row.values())
    return table


def task_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the formatted cells of one result, by column.

    Args:
        result: Result of `laconic eval tasks`.
    """
    name = str(result["model"]).rstrip("/").rpartition("/")[2]
    return [_cells(row, name, has_baseline=result["baseline"] is not None) for row in result["rows"]]


def _cells(row: Mapping[str, Any], name: str, *, has_baseline: bool) -> dict[str, str]:
    cells = {
        "task": row["task"] + (f" ({row['tasks']} tasks)" if row["tasks"] > 1 else ""),
        "metric": row["metric"] + ("" if row["higher_is_better"] else " ↓"),
        "n": str(row["documents"]),
    }
    if not has_baseline:
        return cells | {name: _with_error(row["value"], row["stderr"])}
    return cells | {
        "original": _with_error(row["baseline"], row["baseline_stderr"]),
        "compressed": _with_error(row["value"], row["stderr"]),
        "difference": _with_error(row["difference"], row["difference_stderr"], sign="+"),
        "retention": "-" if row["retention"] is None else f"{row['retention']:.1%}",
    }


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    digits = 4 if abs(value) < 10 else 2
    return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def tasks_caption(result: Mapping[str, Any]) -> str:
    """Describe the setting of a result, and its mean retention.

    Args:
        result: Result of `laconic eval tasks`.

    Returns:
        The description, in one line.
    """
    shots = sorted(set(result["shots"].values()))
    text = f"{' or '.join(map(str, shots))} shots, documents from {result['data']}, {result['dtype']}"
    if result.get("left_out"):
        text += f"; without {', '.join(result['left_out'])} of the standard suite, which have no file there"
    if result["limit"]:
        text += f", the first {result['limit']} of each task"
    context = f"{result.get('context_length')} tokens"
    if result.get("refused"):
        text += f"; without {', '.join(result['refused'])}, whose answers leave no space for a prompt in {context}"
    documents = {row["task"]: row["documents"] for row in result["rows"]}
    if cut := {task: n for task, n in result.get("cut", {}).items() if task in documents}:
        counts = ", ".join(f"{task} {n} of {documents[task]}" for task, n in cut.items())
        where = "beginning (LongBench: middle)" if any("longbench" in task for task in cut) else "beginning"
        text += f"; prompts truncated at the {where} to fit {context}: {counts}"
    if result["mean_retention"] is not None:
        text += (
            f"; mean retention {result['mean_retention']:.1%} (one metric per task: acc_norm, else acc, else "
            "exact_match, else score)"
        )
    elif result["baseline"] is not None:
        text += "; no mean retention, since a score of the original is 0"
    return text + ". n: documents; ±: one standard error, for differences paired by document; ↓: lower is better"
