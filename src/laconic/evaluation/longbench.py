"""LongBench (Bai et al., arXiv 2308.14508) in lm-eval: names of its tasks, and fields of its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def is_longbench(task: str) -> bool:
    """Return whether lm-eval's task or group of this name is part of LongBench."""
    return task.partition("_")[0] == "longbench"


def is_extended(task: str) -> bool:
    """Return whether a task is part of LongBench-E, a group of its own with documents of evenly distributed lengths."""
    return is_longbench(task) and task.endswith("_e")


def required_fields(task: str) -> dict[str, type]:
    """Return the fields that a row of a task must have, with their types."""
    fields: dict[str, type] = {"context": str, "answers": list}
    return fields | ({"all_classes": list} if re.match("longbench_(trec|lsht)", task) else {})


def to_lm_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row to the fields that lm-eval's prompts and metrics read.

    Raises:
        ValueError: A field is missing.
    """
    # The benchmark's own files call it `input`.
    question = row.get("question", row.get("input"))
    if not isinstance(question, str):
        raise ValueError("needs 'question' (or 'input'), a text")
    if not row["answers"] or not all(isinstance(a, str) for a in row["answers"]):
        raise ValueError("needs 'answers', of one text or more")
    fields = {"context": row["context"], "question": question, "answers": row["answers"]}
    return fields | {"all_classes": row.get("all_classes")}
