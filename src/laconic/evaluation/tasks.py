"""`laconic eval tasks`: standard tasks through lm-eval, an artifact beside its original on the same documents."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence, Set
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import load_tokenizer, model_folder, read_config
from laconic.evaluation.bootstrap import describe_intervals
from laconic.evaluation.caches import cache_suffix, parse_stage, resolve, title
from laconic.evaluation.file_names import slug
from laconic.evaluation.harness import SEEDS, TaskRun, open_hub, quiet_lm_eval, require_lm_eval, run_tasks
from laconic.evaluation.models import device_named, dtype_named, name_of_dtype
from laconic.evaluation.options import TaskOptions
from laconic.evaluation.retention import compare_scores, mean_retention
from laconic.evaluation.suites import standard_tasks
from laconic.evaluation.task_calibration import calibration_rows
from laconic.evaluation.task_files import OpenTasks, open_local
from laconic.kv.attach import use_by_default
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load


def evaluate_tasks(model: str | Path, options: TaskOptions) -> dict[str, Any]:
    """Measure lm-eval's tasks, with standard errors; with an original, paired differences and retention.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: The tasks, the original and how to measure.

    Returns:
        The result, as it is saved in `results/` of an artifact. A task whose answers do not fit the context has no
        rows; `refused` gives the reason.

    Raises:
        ValueError: A task or its documents cannot be read, no task fits the context, an option does not fit the model,
            or lm-eval is not installed.
    """
    names, left_out = _task_names(options)
    folders = [model_folder(str(m), trust=options.trust) for m in (model, options.baseline) if m]
    length = _common_context(folders, options)
    require_lm_eval()
    start = time.monotonic()
    with quiet_lm_eval() if options.quiet else nullcontext():
        opened = open_local(names, Path(options.data), options.fewshot) if options.data else open_hub(names)
        run, cache, dtype = _run(folders[0], opened, options, length, options.kv)
        baseline = _run(folders[1], opened, options, length, ())[0] if options.baseline else None
    if run.refused and not run.scores:
        raise ValueError(next(iter(run.refused.values())))
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": options.baseline,
        "tasks": names,
        "suite": options.suite,
        "left_out": left_out,
        "data": str(options.data) if options.data else "Hub",
        "limit": options.limit,
        "fewshot": options.fewshot,
        "shots": run.shots,
        "refused": run.refused,
        "cut": run.cut,
        **_rows(run, baseline, opened),
        "context_length": length,
        "batch_size": options.batch_size,
        "cache": cache,
        "dtype": dtype,
        "device": device_named(options.device),
        "seeds": SEEDS,
        "task_versions": run.versions,
        "seconds": round(time.monotonic() - start, 2),
        "command": command_line(),
        "versions": versions() | {"lm-eval": version("lm-eval")},
    }
    artifact = Artifact(folders[0])
    if artifact.recipe is not None:
        artifact.save_result(_file_name(names, options), result)
    return result


def _task_names(options: TaskOptions) -> tuple[list[str], list[str]]:
    """Return the names of the tasks to measure, and of tasks of the suite that have no documents."""
    tasks, left_out = options.tasks, list[str]()
    if options.suite is not None:
        tasks, left_out = standard_tasks(Path(options.data) if options.data else None)
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise ValueError("no task is named; name some, as in hellaswag,arc_easy")
    return names, left_out


def _run(
    folder: Path, opened: OpenTasks, options: TaskOptions, length: int, kv: Sequence[str]
) -> tuple[TaskRun, str | None, str]:
    """Open one model, run the tasks and free the model; return also the names of its cache and its dtype."""
    from laconic.evaluation.lm import OpenedLM

    device, dtype = device_named(options.device), dtype_named(options.dtype)
    model = load(folder, device=device, dtype=dtype, trust=options.trust)
    tokenizer = load_tokenizer(folder, trust=options.trust)
    cache = _set_cache(model, kv)
    lm = OpenedLM(model, tokenizer, context_length=length, batch_size=options.batch_size)
    run, computed_in = run_tasks(lm, opened, options.limit, options.fewshot), name_of_dtype(model.dtype)
    # Two models may not fit in memory, and lm-eval's reference cycles would keep this one alive.
    del model, lm
    gc.collect()
    return run, cache, computed_in


def _set_cache(model: PreTrainedModel, kv: Sequence[str]) -> str | None:
    """Let a model generate with the cache of --kv; return the name of its cache, None for transformers' own.

    Only generated answers use a cache; log-likelihoods are computed in one pass without one.
    """
    for text in kv:
        stage = parse_stage(text)
        use_by_default(model, resolve(stage, model.config), None)
        return title(stage)
    scheme = vars(model).get("kv_scheme")
    return None if scheme is None else str(scheme.method)


def _rows(run: TaskRun, baseline: TaskRun | None, opened: OpenTasks) -> dict[str, Any]:
    """Compare two runs; tasks of a group that has a value of its own are listed apart."""
    rows = compare_scores(run.scores, baseline.scores if baseline else None)
    calibration = calibration_rows(run.predictions, baseline.predictions if baseline else None)
    members = _members_of_groups(opened.tasks, {row["task"] for row in rows})
    top = [row for row in rows if row["task"] not in members]
    return {
        "rows": top,
        "subtasks": [row for row in rows if row["task"] in members],
        "calibration": [row for row in calibration if row["task"] not in members],
        "intervals": describe_intervals("documents"),
        "mean_retention": mean_retention(top) if baseline else None,
    }


def _common_context(folders: Sequence[Path], options: TaskOptions) -> int:
    """Return the number of tokens that every model can read.

    Raises:
        ValueError: More are asked for, or the models have different vocabularies.
    """
    configs = [read_config(folder, trust=options.trust)[1].get_text_config() for folder in folders]
    if len({config.vocab_size for config in configs}) > 1:
        raise ValueError(
            f"baseline {options.baseline} has another vocabulary than {folders[0]}; name the original of this artifact"
        )
    limit = min(getattr(config, "max_position_embeddings", None) or 2048 for config in configs)
    length = options.context_length
    if length is not None and not 2 <= length <= limit:
        raise ValueError(f"--context-length {length} is not between 2 and the model's context of {limit}")
    return length or limit


def _members_of_groups(opened: Sequence[Any], measured: Set[str]) -> set[str]:
    """Return the names of tasks and groups inside groups that have a value of their own and were measured."""
    groups = [g for item in opened if hasattr(item, "get_all_groups") for g in (item, *item.get_all_groups())]
    groups = [group for group in groups if group.has_aggregation and group.name in measured]
    tasks = {task.task_name for group in groups for task in group.get_all_tasks()}
    return tasks | {inner.name for group in groups for inner in group.get_all_groups()}


def _file_name(names: Sequence[str], options: TaskOptions) -> str:
    """Return a name of the result that differs between other tasks, limits, prompts and caches."""
    name = "tasks-" + slug([options.suite] if options.suite else names)
    name += (f"-{options.limit}" if options.limit else "") + (
        f"-{options.fewshot}shot" if options.fewshot is not None else ""
    )
    return name + cache_suffix(options.kv)
