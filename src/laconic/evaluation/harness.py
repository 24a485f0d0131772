"""Runs of lm-eval's tasks: open tasks of the Hub, and evaluate one model on tasks that are open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from laconic.checkpoint.files import first_line
from laconic.evaluation.calibration import Predictions
from laconic.evaluation.longbench import is_longbench
from laconic.evaluation.retention import Score, read_groups, read_scores
from laconic.evaluation.task_calibration import add_groups, read_predictions
from laconic.evaluation.task_files import OpenTasks, explain, suggest

# lm-eval's defaults, given explicitly because they are part of a result.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True)
class TaskRun:
    """Results of one model on tasks; refused tasks, and groups that contain one, are in `refused` only.

    Attributes:
        scores: Scores of groups, then of tasks.
        predictions: By task or group, predictions of multiple-choice tasks.
        shots: By task, the number of examples in a prompt.
        versions: By task, lm-eval's version of it.
        cut: By task or group, the number of documents with a truncated prompt.
        refused: By task, the reason why it could not be measured.
    """

    scores: list[Score]
    predictions: dict[str, Predictions]
    shots: dict[str, int]
    versions: dict[str, Any]
    cut: dict[str, int]
    refused: dict[str, str]


def require_lm_eval() -> None:
    """Check that lm-eval can be imported.

    Raises:
        ValueError: It cannot.
    """
    try:
        import laconic.evaluation.lm  # noqa: F401
    except ImportError as e:
        raise ValueError(
            f"tasks are measured by lm-eval, which cannot be imported ({first_line(e)}); pip install 'laconic[eval]'"
        ) from e


def run_tasks(lm: Any, opened: OpenTasks, limit: int | None, fewshot: int | None) -> TaskRun:
    """Evaluate one model on open tasks.

    Args:
        lm: An `lm.OpenedLM`.
        opened: The tasks.
        limit: Number of documents of each task, from its first one. None: all.
        fewshot: Number of examples in a prompt. None: the task's default.

    Returns:
        The results.
    """
    from lm_eval import evaluator

    # lm-eval runs git in the current folder, whose error message would be printed if it is not a repository.
    with mock.patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True):
        results: Any = evaluator.simple_evaluate(
            lm,
            tasks=opened.tasks,
            task_manager=opened.manager,
            num_fewshot=fewshot,
            limit=limit,
            # Standard errors come from the logged samples; lm-eval's bootstrap would take long for some metrics.
            bootstrap_iters=0,
            log_samples=True,
            **SEEDS,
        )
    loaded = opened.manager.load(opened.tasks)
    tasks = {name: task for name, task in loaded["tasks"].items() if name not in lm.refused}
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in loaded["groups"].items()}
    groups = {name: loaded["groups"][name] for name, names in members.items() if not lm.refused.keys() & set(names)}
    scores = read_scores(results, tasks)
    cut = {name: sum(lm.cut[task] for task in members.get(name, [name])) for name in [*groups, *tasks]}
    return TaskRun(
        read_groups(results, groups, scores) + scores,
        add_groups(read_predictions(results, tasks), groups),
        {name: results["n-shot"][name] for name in tasks},
        {name: results["versions"][name] for name in tasks},
        {name: documents for name, documents in cut.items() if documents},
        dict(lm.refused),
    )


def open_hub(names: Sequence[str]) -> OpenTasks:
    """Open lm-eval's tasks and groups of these names, with their data sets from the Hub or its cache.

    Args:
        names: Names of tasks and groups, or patterns such as `blimp_*`.

    Returns:
        The tasks and groups.

    Raises:
        ValueError: A name is unknown, or a task cannot be opened.
    """
    import lm_eval.tasks

    # LongBench has a folder of its own; reading all of lm-eval's configs takes ten seconds.
    folder = str(Path(lm_eval.tasks.__file__).parent / "longbench")
    settings = {"include_path": folder, "include_defaults": False} if all(map(is_longbench, names)) else {}
    manager = lm_eval.tasks.TaskManager(**settings)
    tasks: list[Any] = []
    for pattern in names:
        matches = manager.match_tasks([pattern])
        if not matches:
            hint = suggest(pattern, manager.all_tasks) or "; list its tasks with 'lm-eval ls tasks'"
            raise ValueError(f"lm-eval has no task '{pattern}'{hint}")
        for name in matches:
            try:
                loaded = manager.load(name)
            except Exception as e:
                message = explain(name, e)
                if not isinstance(e, ImportError):
                    message += "; its data set comes from the Hub: go online, or give local files with --data DIR"
                raise ValueError(message) from e
            # A tag is only a list of tasks; a group has a value of its own.
            group = loaded["groups"].get(name)
            tasks.extend([group] if group else loaded["tasks"].values())
    return OpenTasks(tasks, manager)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Discard lm-eval's output; not all of its progress bars can be turned off otherwise."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
