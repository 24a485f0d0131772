"""LongBench (Bai et al., arXiv 2308.14508) in lm-eval: names of its tasks, and fields of its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def is_longbench(task: str) -> bool:
    """Return whether lm-eval's task or group of this name is part of LongBench.

    Args:
        task: Name of the task or group.
    """
    return task.partition("_")[0] == "longbench"


def is_extended(task: str) -> bool:
    """Return whether a task is part of LongBench-E, a separate group with documents of evenly distributed lengths.

    Args:
        task: Name of the task.
    """
    return is_longbench(task) and task.endswith("_e")


def required_fields(task: str) -> dict[str, type]:
    """Return the fields that a row of a task must have, with their types.

    Args:
        task: Name of the task.
    """
    fields: dict[str, type] = {"context": str, "answers": list}
    return fields | ({"all_classes": list} if re.match("longbench_(trec|lsht)", task) else {})


def to_lm_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row to the fields that lm-eval's prompts and metrics read.

    Args:
        row: A row of LongBench; the question is under `question` or, as in the benchmark's own files, under `input`.

    Returns:
        The keys `context`, `question`, `answers` and `all_classes` (None if the row has none).

    Raises:
        ValueError: The question is missing or not a text, or `answers` is empty or has other values than texts.
    """
    # The benchmark's own files call it `input`.
    question = row.get("question", row.get("input"))
    if not isinstance(question, str):
        raise ValueError("needs 'question' (or 'input'), a text")
    if not row["answers"] or not all(isinstance(a, str) for a in row["answers"]):
        raise ValueError("needs 'answers', of one text or more")
    fields = {"context": row["context"], "question": question, "answers": row["answers"]}
    return fields | {"all_classes": row.get("all_classes")}
