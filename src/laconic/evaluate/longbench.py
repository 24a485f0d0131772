"""LongBench (Bai et al., arXiv 2308.14508) as lm-eval has it: which tasks are its, and what its rows are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def is_longbench(task: str) -> bool:
    """Whether lm-eval's task or group of this name is LongBench's."""
    return task.partition("_")[0] == "longbench"


def is_extended(task: str) -> bool:
    """Whether it is of LongBench-E, whose documents are spread evenly over lengths and which is a group of its own."""
    return is_longbench(task) and task.endswith("_e")


def fields_of(task: str) -> dict[str, type]:
    """What a row of a task must have."""
    chosen: dict[str, type] = {"context": str, "answers": list}
    return chosen | ({"all_classes": list} if re.match("longbench_(trec|lsht)", task) else {})


def as_lm_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the fields that lm-eval's prompts and metrics read. Raises: ValueError when one is missing."""
    # The benchmark's own files call it `input`.
    question = row.get("question", row.get("input"))
    if not isinstance(question, str):
        raise ValueError("needs 'question' (or 'input'), a text")
    if not row["answers"] or not all(isinstance(a, str) for a in row["answers"]):
        raise ValueError("needs 'answers', of one text or more")
    kept = {"context": row["context"], "question": question, "answers": row["answers"]}
    return kept | {"all_classes": row.get("all_classes")}
