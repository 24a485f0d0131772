"""`laconic eval --tasks`: standard tasks by lm-eval, an artifact beside its original on the same documents."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.files import first_line
from laconic.checkpoint.source import load_tokenizer, model_folder, read_config
from laconic.evaluate.bootstrap import method_of
from laconic.evaluate.caches import of_caches, read_stage, resolve, title
from laconic.evaluate.calibration import Predictions
from laconic.evaluate.longbench import is_longbench
from laconic.evaluate.names import slug
from laconic.evaluate.recovery import Score, compare, mean_recovery, read_groups, read_scores
from laconic.evaluate.suites import standard_tasks
from laconic.evaluate.task_calibration import compare_calibration, read_predictions, with_groups
from laconic.evaluate.task_files import explain, open_local, suggest
from laconic.kv.open import use_by_default
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load

# lm-eval's own defaults, said here because they belong to a result.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


def evaluate_tasks(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    baseline: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    context_length: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    kv: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Accuracy and the like on lm-eval's tasks, with standard errors; beside `baseline`, paired.

    tasks: lm-eval's names of tasks, groups or tags, or patterns of them; or suite: `standard`, the tasks of
    `suites.STANDARD`, of which those that `data` has no file for are left out, and named. data: a folder of local JSONL
    files to take the documents from, in place of the Hub. limit: the first so many documents of each task. fewshot:
    examples in a prompt (the task's own number when not given). context_length: tokens a prompt and its answer may have
    (the model's context when not given); a longer prompt loses its beginning. dtype: to compute in (the checkpoint's
    own when not given). kv: one cache, as `caches_for` reads it, that the artifact generates with, in place of its own
    if it has one. quiet: without lm-eval's progress bars.

    Returns what is written to `results/` of the artifact. Of tasks whose answers do not fit the context there are no
    rows, and `refused` says why. Raises: ValueError for what the caller can mend; where no task fits, too.
    """
    for what, value, least in (("--limit", limit, 1), ("--fewshot", fewshot, 0), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{what} {value} is less than {least}")
    if len(kv) > 1:
        raise ValueError("tasks are measured with one cache; give --kv once, or use --suite long for several")
    left_out: list[str] = []
    if suite is not None:
        tasks, left_out = standard_tasks(Path(data) if data else None)
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise ValueError("--tasks names no task; name some, as in --tasks hellaswag,arc_easy")
    folders = [model_folder(str(m)) for m in (model, baseline) if m]
    length = _common_context(folders, context_length, baseline)
    require_lm_eval()
    from laconic.evaluate.lm import OpenedLM

    begun = time.monotonic()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with silence() if quiet else nullcontext():
        opened, manager = open_local(names, Path(data), fewshot) if data else open_hub(names)
        runs, cache = [], None
        for i, folder in enumerate(folders):
            ours = load(folder, device=place, dtype=getattr(torch, dtype) if dtype else None)
            if i == 0:
                cache = _generate_with(ours, kv)
            lm = OpenedLM(ours, load_tokenizer(folder), context_length=length, batch_size=batch_size)
            runs.append(run_tasks(lm, opened, manager, limit, fewshot))
            precision = str(ours.dtype).removeprefix("torch.")
            # One model in memory at a time.
            del ours, lm
            gc.collect()
    refused = runs[0].refused
    if refused and not runs[0].scores:
        raise ValueError(next(iter(refused.values())))
    rows = compare(runs[0].scores, runs[1].scores if baseline else None)
    inner = _members(opened, {row["task"] for row in rows})
    top = [row for row in rows if row["task"] not in inner]
    calibration = compare_calibration(runs[0].predictions, runs[1].predictions if baseline else None)
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": baseline,
        "tasks": names,
        "suite": suite,
        "left_out": left_out,
        "data": str(data) if data else "Hub",
        "limit": limit,
        "fewshot": fewshot,
        "shots": runs[0].shots,
        "refused": refused,
        "cut": runs[0].cut,
        "rows": top,
        "subtasks": [row for row in rows if row["task"] in inner],
        "calibration": [row for row in calibration if row["task"] not in inner],
        "intervals": method_of("documents"),
        "mean_recovery": mean_recovery(top) if baseline else None,
        "context_length": length,
        "batch_size": batch_size,
        "cache": cache,
        "dtype": precision,
        "device": place,
        "seeds": SEEDS,
        "task_versions": runs[0].versions,
        "seconds": round(time.monotonic() - begun, 2),
        "command": command_line(),
        "versions": versions() | {"lm-eval": version("lm-eval")},
    }
    artifact = Artifact(folders[0])
    if artifact.recipe is not None:
        artifact.save_result(_file_name([suite] if suite else names, limit, fewshot) + of_caches(kv), result)
    return result


def require_lm_eval() -> None:
    """Raises: ValueError where it cannot be imported."""
    try:
        import laconic.evaluate.lm  # noqa: F401
    except ImportError as e:
        raise ValueError(
            f"tasks are measured by lm-eval, which cannot be imported ({first_line(e)}); pip install 'laconic[eval]'"
        ) from e


def _generate_with(model: PreTrainedModel, kv: Sequence[str]) -> str | None:
    """Have a model generate with the cache asked for; says which it has, None for transformers' own. Only answers that
    are generated go through a cache; likelihoods are read in one pass, without."""
    for text in kv:
        stage = read_stage(text)
        use_by_default(model, resolve(stage, model.config), None)
        return title(stage)
    own = vars(model).get("kv_scheme")
    return None if own is None else str(own.method)


@dataclass(frozen=True)
class TaskRun:
    """What one model made of the tasks. cut: by task or group, of how many documents a prompt was cut. refused: as
    `OpenedLM` has it; there is nothing else of these tasks, nor of groups that they belong to."""

    scores: list[Score]
    predictions: dict[str, Predictions]
    shots: dict[str, int]
    versions: dict[str, Any]
    cut: dict[str, int]
    refused: dict[str, str]


def run_tasks(lm: Any, opened: list[Any], manager: Any, limit: int | None, fewshot: int | None) -> TaskRun:
    """One model through tasks that are open. limit, fewshot: as `evaluate_tasks` has them."""
    from lm_eval import evaluator

    # lm-eval asks git about the current folder, whose complaint where there is none would land on the terminal.
    with mock.patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True):
        results: Any = evaluator.simple_evaluate(
            lm,
            tasks=opened,
            task_manager=manager,
            num_fewshot=fewshot,
            limit=limit,
            # Standard errors are ours, from the logged samples; lm-eval would draw a hundred thousand samples for some.
            bootstrap_iters=0,
            log_samples=True,
            **SEEDS,
        )
    loaded = manager.load(opened)
    tasks = {name: task for name, task in loaded["tasks"].items() if name not in lm.refused}
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in loaded["groups"].items()}
    groups = {name: loaded["groups"][name] for name, within in members.items() if not lm.refused.keys() & set(within)}
    leaves = read_scores(results, tasks)
    cut = {name: sum(lm.cut[task] for task in members.get(name, [name])) for name in [*groups, *tasks]}
    return TaskRun(
        read_groups(results, groups, leaves) + leaves,
        with_groups(read_predictions(results, tasks), groups),
        {name: results["n-shot"][name] for name in tasks},
        {name: results["versions"][name] for name in tasks},
        {name: documents for name, documents in cut.items() if documents},
        dict(lm.refused),
    )


def open_hub(names: Sequence[str]) -> tuple[list[Any], Any]:
    """lm-eval's tasks and groups of these names, with their data sets from the Hub (or its cache), and the manager."""
    import lm_eval.tasks

    # LongBench alone is a folder of its own; reading all of lm-eval's configs takes ten seconds.
    folder = str(Path(lm_eval.tasks.__file__).parent / "longbench")
    own = {"include_path": folder, "include_defaults": False} if all(map(is_longbench, names)) else {}
    manager = lm_eval.tasks.TaskManager(**own)
    opened: list[Any] = []
    for pattern in names:
        found = manager.match_tasks([pattern])
        if not found:
            raise ValueError(f"lm-eval has no task '{pattern}'{suggest(pattern, manager.all_tasks)}")
        for name in found:
            try:
                loaded = manager.load(name)
            except Exception as e:
                said = explain(name, e)
                if not isinstance(e, ImportError):
                    said += "; its data set comes from the Hub: go online, or give local files with --tasks-data DIR"
                raise ValueError(said) from e
            # A tag is only a list of tasks; a group has a value of its own.
            group = loaded["groups"].get(name)
            opened.extend([group] if group else loaded["tasks"].values())
    return opened, manager


def _common_context(folders: Sequence[Path], asked: int | None, baseline: str | None) -> int:
    """Tokens that every model can read.

    Raises: ValueError when more are asked for, or the models do not belong together.
    """
    configs = [read_config(folder)[1].get_text_config() for folder in folders]
    if len({config.vocab_size for config in configs}) > 1:
        raise ValueError(
            f"baseline {baseline} has another vocabulary than {folders[0]}; is it the original of this artifact?"
        )
    limit = min(getattr(config, "max_position_embeddings", None) or 2048 for config in configs)
    if asked is not None and not 2 <= asked <= limit:
        raise ValueError(f"--context-length {asked} is not between 2 and the model's context of {limit}")
    return asked or limit


@contextmanager
def silence() -> Iterator[None]:
    """Nothing of lm-eval's on the terminal: its bars cannot all be turned off otherwise."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _members(opened: Sequence[Any], shown: Set[str]) -> set[str]:
    """Names of the tasks and groups for which a group stands that has a value of its own, and is among `shown`."""
    found = [g for item in opened if hasattr(item, "get_all_groups") for g in (item, *item.get_all_groups())]
    groups = [group for group in found if group.has_aggregation and group.name in shown]
    inner = {task.task_name for group in groups for task in group.get_all_tasks()}
    return inner | {below.name for group in groups for below in group.get_all_groups()}


def _file_name(names: Sequence[str], limit: int | None, fewshot: int | None) -> str:
    """Runs of other tasks, limits or prompts do not replace one another."""
    name = "tasks-" + slug(names)
    return name + (f"-{limit}" if limit else "") + (f"-{fewshot}shot" if fewshot is not None else "")
