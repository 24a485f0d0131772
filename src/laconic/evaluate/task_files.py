"""Standard tasks over local files: the prompts and metrics are lm-eval's own, only the rows come from JSONL.

A row is renamed into the fields that lm-eval's task of that name reads; everything else is that task's own config.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from laconic.checkpoint.files import first_line
from laconic.evaluate.longbench import as_lm_eval, fields_of, is_extended, is_longbench

Row = Mapping[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """home: the folder of lm-eval's tasks that has its config. file, train: names without suffix, of the documents and
    of the examples for few-shot prompts. fields: what a row must have, and of what type. rename: a row in lm-eval's
    fields. within: of many tasks in one file, the name of a row's own."""

    home: str
    file: str
    fields: Mapping[str, type]
    rename: Callable[[Row], Fields]
    train: str = ""
    within: Callable[[Row], str] | None = None


def open_local(names: Sequence[str], folder: Path, fewshot: int | None) -> tuple[list[Any], Any]:
    """lm-eval's tasks (and groups) of these names over the files of a folder, and the manager that made them.

    A name may be a pattern (`blimp_*`). `blimp` and `mmlu` are groups of what the folder has of them. fewshot: examples
    in a prompt, the task's own number when not given.
    Raises: ValueError for an unknown name, a missing file, or a row that is not as it should be.
    """
    from lm_eval.api.group import Group

    if not folder.is_dir():
        raise ValueError(f"no folder '{folder}' with the data of the tasks; check --tasks-data")
    kinds = _kinds(folder)
    chosen = {name: _named(name, kinds, folder) for name in names}
    wanted = list(dict.fromkeys(member for members in chosen.values() for member in members))
    tasks, manager = _build(wanted, kinds, folder)
    for name, task in tasks.items():
        _check_examples(name, task, folder / f"{_train(name, kinds[name])}.jsonl", fewshot)
    opened: list[Any] = []
    for name, members in chosen.items():
        if name not in _GROUPS:
            opened.extend(tasks[m] for m in members)
            continue
        metric, by_size = _GROUPS[name]
        how = {"metric": metric, "aggregation": "mean", "weight_by_size": by_size}
        group = Group.from_config({"group": name, "aggregate_metric_list": [how]})
        for member in members:
            group.add(tasks[member])
        opened.append(group)
    return opened, manager


def documents_of(name: str, folder: Path) -> Path | None:
    """The file of a folder that has the documents of a task, or of one of a group; None where there is none."""
    kinds = _kinds(folder)
    for member in _members(name, kinds):
        file = folder / f"{kinds[member].file}.jsonl"
        if file.exists():
            return file
    return None


def suggest(name: str, known: Sequence[str]) -> str:
    """A half sentence that names what was perhaps meant."""
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _kinds(folder: Path) -> dict[str, _Kind]:
    """Every task that could be opened, by name, with those of families that the folder has."""
    kinds = dict(_SINGLE)
    for file in sorted(folder.glob("blimp_*.jsonl")):
        kinds[file.stem] = _Kind("blimp", file.stem, _PAIR, _fields(_PAIR))
    for file in sorted(folder.glob("longbench_*.jsonl")):
        kinds[file.stem] = _Kind("longbench", file.stem, fields_of(file.stem), as_lm_eval)
    if (folder / "mmlu.jsonl").exists():
        subjects = {str(row.get("subject")) for _, row in _rows(folder / "mmlu.jsonl")}
        kinds |= {f"mmlu_{subject}": _MMLU for subject in sorted(subjects)}
    return kinds


def explain(name: str, error: Exception) -> str:
    """Why lm-eval cannot open a task, and what to do where packages are missing."""
    if not isinstance(error, ImportError):
        return f"the task '{name}' could not be opened ({first_line(error)})"
    wanted = "pip install 'laconic[longbench]'" if is_longbench(name) else f"it says: {first_line(error)}"
    return f"the task '{name}' needs packages that are not installed; {wanted}"


def _members(name: str, kinds: Mapping[str, _Kind]) -> list[str]:
    """The tasks of a group, or those that a pattern names."""
    if name not in _GROUPS:
        return [k for k in kinds if fnmatchcase(k, name)]
    return [k for k in kinds if k.startswith(f"{name}_") and not is_extended(k)]


def _named(name: str, kinds: Mapping[str, _Kind], folder: Path) -> list[str]:
    name = _ALIASES.get(name, name)
    members = _members(name, kinds)
    if not members and name in _GROUPS:
        raise ValueError(f"{folder} has no {name}*.jsonl for the task '{name}'")
    if not members:
        known = [*kinds, *_GROUPS, *_ALIASES]
        raise ValueError(f"no task '{name}' over local files{suggest(name, known) or f'; there are {_listed(known)}'}")
    return members


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _build(names: Sequence[str], kinds: Mapping[str, _Kind], folder: Path) -> tuple[dict[str, Any], Any]:
    """lm-eval's tasks by name: its own configs with the documents replaced."""
    import lm_eval.tasks

    # Only the folders that are needed: reading all of lm-eval's fifteen thousand configs takes ten seconds.
    root = Path(lm_eval.tasks.__file__).parent
    homes = sorted({str(root / kinds[n].home) for n in names})
    manager = lm_eval.tasks.TaskManager(include_path=homes, include_defaults=False)
    configs = []
    for name in names:
        if name not in manager.task_index:
            raise ValueError(f"{folder / kinds[name].file}.jsonl: lm-eval has no task '{name}'")
        splits = _splits(name, kinds[name], folder)
        train = "train" if "train" in splits else None
        configs.append(
            {
                "task": name,
                "custom_dataset": lambda splits=splits, **_: splits,
                "dataset_kwargs": None,
                "training_split": train,
                "fewshot_split": train,
                "validation_split": None,
                "test_split": "test",
            }
        )
    # A group inherits the registered config of each member, which a task given as a dict does not.
    try:
        return manager.load({"group": "local", "task": configs})["tasks"], manager
    except ImportError as e:
        # lm-eval asks for packages when it reads a config that names a function.
        name = next((n for n in names if is_longbench(n)), names[0])
        raise ValueError(explain(name, e)) from e


def _splits(name: str, kind: _Kind, folder: Path) -> dict[str, Any]:
    """The documents in lm-eval's fields, and the examples for few-shot prompts if there is a file of them."""
    from datasets import Dataset

    def read(file: Path) -> Any:
        rows = [_checked(row, kind, where) for where, row in _rows(file) if _belongs(row, kind, name)]
        if not rows:
            raise ValueError(f"{file} has no row for the task '{name}'")
        return Dataset.from_list(rows)

    documents = folder / f"{kind.file}.jsonl"
    if not documents.exists():
        raise ValueError(f"the task '{name}' needs {documents}, which does not exist; check --tasks-data")
    examples = folder / f"{_train(name, kind)}.jsonl"
    return {"test": read(documents)} | ({"train": read(examples)} if examples.exists() else {})


def _train(name: str, kind: _Kind) -> str:
    return kind.train or f"{name}_train"


def _check_examples(name: str, task: Any, file: Path, fewshot: int | None) -> None:
    """Without examples lm-eval would show documents with their answers, the asked one among them."""
    own = task.config.num_fewshot
    # A task that fixes 0 stays at 0.
    shots = own if fewshot is None or own == 0 else fewshot
    held = len(task.dataset["train"]) if "train" in task.dataset else 0
    if shots and held < shots:
        raise ValueError(
            f"the task '{name}' with {shots} examples in a prompt finds {held} in {file}; add some, or lower --fewshot"
        )


def _belongs(row: Row, kind: _Kind, name: str) -> bool:
    return kind.within is None or kind.within(row) == name


def _rows(file: Path) -> list[tuple[str, Row]]:
    """The objects of a JSONL file, each with its place. Raises: ValueError for a line that is none."""
    found: list[tuple[str, Row]] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number},"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where} is not JSON: {e}") from e
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object")
        found.append((where, row))
    return found


def _checked(row: Row, kind: _Kind, where: str) -> Fields:
    for field, expected in kind.fields.items():
        if type(row.get(field)) is not expected:
            raise ValueError(f"{where} needs '{field}', a {_TYPES[expected]}")
    answers = next((row[field] for field in ("choices", "endings") if field in kind.fields), None)
    if answers is not None:
        if not answers or not all(isinstance(a, str) and a for a in answers):
            raise ValueError(f"{where} has an answer that is no text")
        if not 0 <= row["label"] < len(answers):
            raise ValueError(
                f"{where} has label {row['label']}, which is no index (from 0) of its {len(answers)} answers"
            )
    try:
        return kind.rename(row)
    except ValueError as e:
        raise ValueError(f"{where} {e}") from e


_TYPES = {str: "text", int: "number", list: "list"}


def _fields(names: Mapping[str, type]) -> Callable[[Row], Fields]:
    return lambda row: {name: row[name] for name in names}


def _hellaswag(row: Row) -> Fields:
    activity, colon, context = row["ctx"].partition(": ")
    if not colon:
        raise ValueError("needs 'ctx' to begin with an activity and a colon")
    # The sentence to complete is stored in lower case after the others; lm-eval raises its first letter.
    whole, begun = context, ""
    if match := re.fullmatch(r"(.*[.!?]) ([a-z].*)", context, re.DOTALL):
        whole, begun = match.groups()
    return {
        "activity_label": activity,
        "ctx_a": whole,
        "ctx_b": begun,
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
    sol1, sol2 = _two(row)
    return {"goal": row["question"], "sol1": sol1, "sol2": sol2, "label": row["label"]}


def _winogrande(row: Row) -> Fields:
    option1, option2 = _two(row)
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
        raise ValueError("needs four choices")
    return {"question": row["question"], "choices": row["choices"], "answer": row["label"], "subject": row["subject"]}


def _boolq(row: Row) -> Fields:
    if row["label"] not in (0, 1):
        raise ValueError(f"has label {row['label']}, which is neither 0 (no) nor 1 (yes)")
    return {name: row[name] for name in _YES_NO}


def _lambada(row: Row) -> Fields:
    if " " not in row["text"].strip():
        raise ValueError("needs a 'text' of two words or more")
    return {"text": row["text"].strip()}


def _two(row: Row) -> tuple[str, str]:
    if len(row["choices"]) != 2:
        raise ValueError("needs two choices")
    return row["choices"][0], row["choices"][1]


_PAIR = {"sentence_good": str, "sentence_bad": str}
_ANSWER = {"question": str, "answer": str}
_YES_NO = {"passage": str, "question": str, "label": int}
_QUESTION = {"question": str, "choices": list, "label": int}
_MMLU = _Kind(
    "mmlu/default",
    "mmlu",
    {"subject": str, **_QUESTION},
    _mmlu,
    train="mmlu_train",
    within=lambda row: f"mmlu_{row.get('subject')}",
)
_SINGLE = {
    "hellaswag": _Kind("hellaswag", "hellaswag", {"ctx": str, "endings": list, "label": int}, _hellaswag),
    "arc_easy": _Kind("arc", "arc_easy", _QUESTION, _arc),
    "arc_challenge": _Kind("arc", "arc_challenge", _QUESTION, _arc),
    "piqa": _Kind("piqa", "piqa", _QUESTION, _piqa),
    "boolq": _Kind("super_glue/boolq", "boolq", _YES_NO, _boolq),
    "winogrande": _Kind("winogrande", "winogrande", _QUESTION, _winogrande),
    "lambada_openai": _Kind("lambada", "lambada", {"text": str}, _lambada),
    "gsm8k": _Kind("gsm8k", "gsm8k_test", _ANSWER, _fields(_ANSWER), train="gsm8k_train"),
    "wikitext": _Kind("wikitext", "wikitext", {"page": str}, _fields({"page": str})),
    "c4": _Kind("c4", "c4", {"text": str}, _fields({"text": str})),
}
_ALIASES = {"lambada": "lambada_openai"}
# The metric that lm-eval's group of that name has, and whether it weighs its tasks by their documents.
_GROUPS = {"blimp": ("acc", False), "mmlu": ("acc", True), "longbench": ("score", False)}
