"""lm-eval's tasks over local files: prompts and metrics are lm-eval's, the documents come from JSONL."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from laconic.checkpoint.files import first_line
from laconic.evaluation.longbench import is_extended, is_longbench
from laconic.evaluation.task_rows import Row, TaskFormat, convert_row, formats_in, read_rows

_ALIASES = {"lambada": "lambada_openai"}
# For each group the metric of lm-eval's group of that name, and whether its tasks are weighted by size.
_GROUPS = {"blimp": ("acc", False), "mmlu": ("acc", True), "longbench": ("score", False)}


@dataclass(frozen=True)
class OpenTasks:
    """Tasks that are ready to run.

    Attributes:
        tasks: lm-eval's tasks and groups.
        manager: The lm-eval task manager that opened them.
    """

    tasks: list[Any]
    manager: Any


def open_local(names: Sequence[str], folder: Path, fewshot: int | None) -> OpenTasks:
    """Open lm-eval's tasks and groups over the files of a folder.

    Args:
        names: Names of tasks, patterns (`blimp_*`) or groups (`blimp`, `mmlu`, `longbench`); a group has the tasks
            whose documents are in the folder.
        folder: The folder.
        fewshot: Number of examples in a prompt. None: the task's default.

    Returns:
        The tasks and groups.

    Raises:
        ValueError: A name is unknown, a file is missing, or a row does not have the required fields.
    """
    from lm_eval.api.group import Group

    if not folder.is_dir():
        raise ValueError(f"no folder '{folder}' with the data of the tasks; check --data")
    formats = formats_in(folder)
    members_by_name = {name: _expand(name, formats, folder) for name in names}
    task_names = list(dict.fromkeys(member for members in members_by_name.values() for member in members))
    tasks, manager = _build(task_names, formats, folder)
    for name, task in tasks.items():
        _check_examples(name, task, folder / f"{_train_file(name, formats[name])}.jsonl", fewshot)
    opened: list[Any] = []
    for name, members in members_by_name.items():
        if name not in _GROUPS:
            opened.extend(tasks[m] for m in members)
            continue
        metric, by_size = _GROUPS[name]
        aggregation = {"metric": metric, "aggregation": "mean", "weight_by_size": by_size}
        group = Group.from_config({"group": name, "aggregate_metric_list": [aggregation]})
        for member in members:
            group.add(tasks[member])
        opened.append(group)
    return OpenTasks(opened, manager)


def documents_of(name: str, folder: Path) -> Path | None:
    """Return a file of the folder with documents of a task, or of a task of a group; None if there is none.

    Args:
        name: Name of a task or group, or a pattern.
        folder: Folder with the data of tasks.
    """
    formats = formats_in(folder)
    for member in _members(name, formats):
        file = folder / f"{formats[member].file}.jsonl"
        if file.exists():
            return file
    return None


def suggest(name: str, known: Sequence[str]) -> str:
    """Return the end of an error message that suggests similar names.

    Args:
        name: The unknown name.
        known: The known names.
    """
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def explain(name: str, error: Exception) -> str:
    """Return the message for a task that lm-eval cannot open, with the fix if packages are missing.

    Args:
        name: Name of the task.
        error: The error that lm-eval raised.
    """
    if not isinstance(error, ImportError):
        return f"the task '{name}' could not be opened ({first_line(error)})"
    fix = "pip install 'laconic[longbench]'" if is_longbench(name) else f"the import failed with: {first_line(error)}"
    return f"the task '{name}' needs packages that are not installed; {fix}"


def _members(name: str, formats: Mapping[str, TaskFormat]) -> list[str]:
    """Return the tasks of a group, or those that match a pattern."""
    if name not in _GROUPS:
        return [n for n in formats if fnmatchcase(n, name)]
    return [n for n in formats if n.startswith(f"{name}_") and not is_extended(n)]


def _expand(name: str, formats: Mapping[str, TaskFormat], folder: Path) -> list[str]:
    name = _ALIASES.get(name, name)
    members = _members(name, formats)
    if not members and name in _GROUPS:
        raise ValueError(f"{folder} has no {name}*.jsonl for the task '{name}'; add it, or check --data")
    if not members:
        known = [*formats, *_GROUPS, *_ALIASES]
        names = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ValueError(f"no task '{name}' over local files{suggest(name, known) or f'; known names are {names}'}")
    return members


def _build(names: Sequence[str], formats: Mapping[str, TaskFormat], folder: Path) -> tuple[dict[str, Any], Any]:
    """Build lm-eval's tasks by name: its configs with the documents replaced."""
    import lm_eval.tasks

    # Only the folders that are needed: reading all of lm-eval's fifteen thousand configs takes ten seconds.
    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({str(root / formats[n].folder) for n in names})
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    configs = []
    for name in names:
        if name not in manager.task_index:
            raise ValueError(f"{folder / formats[name].file}.jsonl: lm-eval has no task '{name}'; check the name")
        splits = _splits(name, formats[name], folder)
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
    # Inside a group, a dict inherits the registered config of its task; on its own it does not.
    try:
        return manager.load({"group": "local", "task": configs})["tasks"], manager
    except ImportError as e:
        # lm-eval imports the packages of a task's functions when it reads its config.
        name = next((n for n in names if is_longbench(n)), names[0])
        raise ValueError(explain(name, e)) from e


def _splits(name: str, task_format: TaskFormat, folder: Path) -> dict[str, Any]:
    """Read the documents in lm-eval's fields, and the examples for few-shot prompts if there is a file of them."""
    from datasets import Dataset

    def read(file: Path) -> Any:
        rows = [
            convert_row(row, task_format, place) for place, row in read_rows(file) if _is_of(row, task_format, name)
        ]
        if not rows:
            raise ValueError(f"{file} has no row for the task '{name}'; add some, or leave the task out")
        return Dataset.from_list(rows)

    documents = folder / f"{task_format.file}.jsonl"
    if not documents.exists():
        raise ValueError(f"the task '{name}' needs {documents}, which does not exist; check --data")
    examples = folder / f"{_train_file(name, task_format)}.jsonl"
    return {"test": read(documents)} | ({"train": read(examples)} if examples.exists() else {})


def _train_file(name: str, task_format: TaskFormat) -> str:
    return task_format.train or f"{name}_train"


def _check_examples(name: str, task: Any, file: Path, fewshot: int | None) -> None:
    """Check that there are enough examples; lm-eval would take documents with their answers, the asked one included."""
    default = task.config.num_fewshot
    # A task with 0 examples keeps 0, whatever --fewshot says.
    shots = default if fewshot is None or default == 0 else fewshot
    count = len(task.dataset["train"]) if "train" in task.dataset else 0
    if shots and count < shots:
        raise ValueError(
            f"the task '{name}' with {shots} examples in a prompt finds {count} in {file}; add some, or lower --fewshot"
        )


def _is_of(row: Row, task_format: TaskFormat, name: str) -> bool:
    return task_format.task_of is None or task_format.task_of(row) == name
