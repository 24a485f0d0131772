"""Rows of local task files: required fields, and their conversion to the fields that lm-eval's tasks read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.evaluation.longbench import required_fields, to_lm_eval

Row = Mapping[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True)
class TaskFormat:
    """Format of the local files of a task.

    Attributes:
        folder: Folder of lm-eval's tasks that has the config of the task.
        file: Name without suffix of the file of documents.
        fields: Fields that a row must have, with their types.
        convert: Converts a row to lm-eval's fields.
        train: Name without suffix of the file of examples for few-shot prompts. Empty: the task's name and `_train`.
        task_of: For a file with rows of many tasks, the name of a row's task.
    """

    folder: str
    file: str
    fields: Mapping[str, type]
    convert: Callable[[Row], Fields]
    train: str = ""
    task_of: Callable[[Row], str] | None = None


def formats_in(folder: Path) -> dict[str, TaskFormat]:
    """Return the formats of all known tasks, with those of families that have files in the folder.

    Args:
        folder: Folder with the data of tasks.

    Raises:
        ValueError: `mmlu.jsonl`, which is read for its subjects, has a line that is not a JSON object.
    """
    formats = dict(_SINGLE)
    for file in sorted(folder.glob("blimp_*.jsonl")):
        formats[file.stem] = TaskFormat("blimp", file.stem, _PAIR, _pick(_PAIR))
    for file in sorted(folder.glob("longbench_*.jsonl")):
        formats[file.stem] = TaskFormat("longbench", file.stem, required_fields(file.stem), to_lm_eval)
    if (folder / "mmlu.jsonl").exists():
        subjects = {str(row.get("subject")) for _, row in read_rows(folder / "mmlu.jsonl")}
        formats |= {f"mmlu_{subject}": _MMLU for subject in sorted(subjects)}
    return formats


def read_rows(file: Path) -> list[tuple[str, Row]]:
    """Read the objects of a JSONL file; empty lines are skipped.

    Args:
        file: The file.

    Returns:
        Pairs of a place for error messages, such as `tasks/piqa.jsonl, line 3,`, and an object.

    Raises:
        ValueError: A line is not a JSON object.
    """
    rows: list[tuple[str, Row]] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number},"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{place} is not JSON: {e}; write one object per line") from e
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object; write one object per line")
        rows.append((place, row))
    return rows


def convert_row(row: Row, task_format: TaskFormat, place: str) -> Fields:
    """Check a row and convert it to lm-eval's fields.

    Args:
        row: The row.
        task_format: Format of its file.
        place: Its place, the beginning of error messages.

    Returns:
        The fields of lm-eval.

    Raises:
        ValueError: A field is missing, or has a wrong type or value.
    """
    for field, expected in task_format.fields.items():
        if type(row.get(field)) is not expected:
            raise ValueError(f"{place} needs '{field}', a {_TYPES[expected]}")
    answers = next((row[field] for field in ("choices", "endings") if field in task_format.fields), None)
    if answers is not None:
        if not answers or not all(isinstance(a, str) and a for a in answers):
            raise ValueError(f"{place} has an answer that is not a text, or is empty")
        if not 0 <= row["label"] < len(answers):
            raise ValueError(
                f"{place} has label {row['label']}, which is not an index (from 0) of its {len(answers)} answers"
            )
    try:
        return task_format.convert(row)
    except ValueError as e:
        raise ValueError(f"{place} {e}") from e


_TYPES = {str: "text", int: "number", list: "list"}


def _pick(names: Mapping[str, type]) -> Callable[[Row], Fields]:
    return lambda row: {name: row[name] for name in names}


def _hellaswag(row: Row) -> Fields:
    activity, colon, context = row["ctx"].partition(": ")
    if not colon:
        raise ValueError("needs 'ctx' to begin with an activity and a colon")
    # The last, incomplete sentence is stored in lower case; lm-eval capitalizes its first letter.
    sentences, incomplete = context, ""
    if match := re.fullmatch(r"(.*[.!?]) ([a-z].*)", context, re.DOTALL):
        sentences, incomplete = match.groups()
    return {
        "activity_label": activity,
        "ctx_a": sentences,
        "ctx_b": incomplete,
        "endings": row["endings"],
        "label": str(row["label"]),
    }


def _arc(row: Row) -> Fields:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["label"]],
    }


def _piqa(row: Row) -> Fields:
    sol1, sol2 = _two_choices(row)
    return {"goal": row["question"], "sol1": sol1, "sol2": sol2, "label": row["label"]}


def _winogrande(row: Row) -> Fields:
    option1, option2 = _two_choices(row)
    if "_" not in row["question"]:
        raise ValueError("needs a '_' in 'question', where the choices go")
    return {
        "sentence": row["question"],
        "option1": option1,
        "option2": option2,
        "answer": str(row["label"] + 1),
    }


def _mmlu(row: Row) -> Fields:
    if len(row["choices"]) != 4:
        raise ValueError(f"has {len(row['choices'])} 'choices'; give four")
    return {"question": row["question"], "choices": row["choices"], "answer": row["label"], "subject": row["subject"]}


def _boolq(row: Row) -> Fields:
    if row["label"] not in (0, 1):
        raise ValueError(f"has label {row['label']}; give 0 (no) or 1 (yes)")
    return {name: row[name] for name in _YES_NO}


def _lambada(row: Row) -> Fields:
    if " " not in row["text"].strip():
        raise ValueError("needs a 'text' of two words or more")
    return {"text": row["text"].strip()}


def _two_choices(row: Row) -> tuple[str, str]:
    if len(row["choices"]) != 2:
        raise ValueError(f"has {len(row['choices'])} 'choices'; give two")
    return row["choices"][0], row["choices"][1]


_PAIR = {"sentence_good": str, "sentence_bad": str}
_ANSWER = {"question": str, "answer": str}
_YES_NO = {"passage": str, "question": str, "label": int}
_QUESTION = {"question": str, "choices": list, "label": int}
_MMLU = TaskFormat(
    "mmlu/default",
    "mmlu",
    {"subject": str, **_QUESTION},
    _mmlu,
    train="mmlu_train",
    task_of=lambda row: f"mmlu_{row.get('subject')}",
)
_SINGLE = {
    "hellaswag": TaskFormat("hellaswag", "hellaswag", {"ctx": str, "endings": list, "label": int}, _hellaswag),
    "arc_easy": TaskFormat("arc", "arc_easy", _QUESTION, _arc),
    "arc_challenge": TaskFormat("arc", "arc_challenge", _QUESTION, _arc),
    "piqa": TaskFormat("piqa", "piqa", _QUESTION, _piqa),
    "boolq": TaskFormat("super_glue/boolq", "boolq", _YES_NO, _boolq),
    "winogrande": TaskFormat("winogrande", "winogrande", _QUESTION, _winogrande),
    "lambada_openai": TaskFormat("lambada", "lambada", {"text": str}, _lambada),
    "gsm8k": TaskFormat("gsm8k", "gsm8k_test", _ANSWER, _pick(_ANSWER), train="gsm8k_train"),
    "wikitext": TaskFormat("wikitext", "wikitext", {"page": str}, _pick({"page": str})),
    "c4": TaskFormat("c4", "c4", {"text": str}, _pick({"text": str})),
}
