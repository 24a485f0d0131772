"""The table of task results, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def tasks_table(result: Mapping[str, Any]) -> Table:
    """One row a metric of a result of `laconic eval --tasks`."""
    table = Table(box=box.SIMPLE, caption=tasks_caption(result), caption_justify="left", pad_edge=False)
    rows = task_rows(result)
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i > 1 else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row.values())
    return table


def task_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The formatted cells of one result, by column."""
    name = str(result["model"]).rstrip("/").rpartition("/")[2]
    return [_cells(row, name, compared=result["baseline"] is not None) for row in result["rows"]]


def _cells(row: Mapping[str, Any], name: str, *, compared: bool) -> dict[str, str]:
    cells = {
        "task": row["task"] + (f" ({row['tasks']} tasks)" if row["tasks"] > 1 else ""),
        "metric": row["metric"] + ("" if row["higher_is_better"] else " ↓"),
        "n": str(row["documents"]),
    }
    if not compared:
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
    """How the result was measured, and the mean retention."""
    shots = sorted(set(result["shots"].values()))
    said = f"{' or '.join(map(str, shots))} shots, documents from {result['data']}, {result['dtype']}"
    if result.get("left_out"):
        said += f"; without {', '.join(result['left_out'])} of the standard suite, which have no file there"
    if result["limit"]:
        said += f", the first {result['limit']} of each task"
    room = f"{result.get('context_length')} tokens"
    if result.get("refused"):
        said += f"; without {', '.join(result['refused'])}, whose answers leave no room for a prompt in {room}"
    documents = {row["task"]: row["documents"] for row in result["rows"]}
    if cut := {task: n for task, n in result.get("cut", {}).items() if task in documents}:
        told = ", ".join(f"{task} {n} of {documents[task]}" for task, n in cut.items())
        where = "beginning (LongBench's, their middle)" if any("longbench" in task for task in cut) else "beginning"
        said += f"; prompts that lost their {where}, to fit {room}: {told}"
    if result["mean_retention"] is not None:
        said += (
            f"; mean retention {result['mean_retention']:.1%} (a task counts once: acc_norm, else acc, else "
            "exact_match, else score)"
        )
    elif result["baseline"] is not None:
        said += "; no mean retention, since an original is 0"
    return said + ". n: documents; ±: one standard error, for differences paired by document; ↓: low is good"
