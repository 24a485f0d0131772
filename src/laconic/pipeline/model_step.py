"""One stage that needs the whole model: give it the checkpoint of the step before, write the model that it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.artifact.identity import partial_folder
from laconic.artifact.workspace import Workspace, scratch_folder
from laconic.checkpoint.extra import extra_linears, extra_names, extra_shards, load_extra, renumber_blocks
from laconic.checkpoint.files import DTYPES, Checkpoint
from laconic.checkpoint.layout import arrange, to_file_layout
from laconic.checkpoint.source import build_skeleton, main_dtype, read_config
from laconic.checkpoint.trust import Trust
from laconic.formats.schemes import Scheme
from laconic.pipeline.calibration import device_of
from laconic.pipeline.engines import quantization_config
from laconic.pipeline.model_outcome import check_finite_weights, check_model_outcome, check_shapes
from laconic.pipeline.provenance import account
from laconic.runtime.inputs import open_input
from laconic.runtime.linear import QLinear
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from laconic.structure.anatomy import dissect, find_blocks, linears_of
from laconic.walk.spans import record_span

if TYPE_CHECKING:
    from laconic.pipeline.pipeline import Pipeline, Step

Report = Callable[[Mapping[str, Any]], None]


def run_model_step(
    pipeline: Pipeline,
    step: Step,
    before: Path | None,
    *,
    overwrite: bool,
    report: Report,
    describe: Callable[[Path], None],
) -> None:
    """Apply a stage to the whole model and write what it leaves.

    Args:
        pipeline: the recipe's.
        step: that of the stage.
        before: the folder that the step before has written; None for the original model.
        overwrite: whether what another recipe has begun may be removed.
        report: called with events of progress.
        describe: writes the cards into the folder.

    Raises:
        ValueError: if the stage cannot treat the model.
    """
    start = time.monotonic()
    stage, folder = _stage(step), before or pipeline.source.folder
    torch.manual_seed(pipeline.recipe.seed)
    with Workspace(step.output, step.identity, 0, overwrite=overwrite) as workspace:
        task = _task(pipeline, stage, folder, workspace.folder, workspace.scratch, report)
        try:
            with record_span(stage.method), torch.set_grad_enabled(stage.needs.gradients):
                outcome = check_model_outcome(stage, stage.apply(task))
            config = _config_after(folder, outcome, pipeline.trust)
            if outcome.shards:
                _write_shards(workspace, outcome.shards, report)
            elif outcome.model is not None:
                check_shapes(stage, outcome, config, folder, pipeline.trust)
                config |= _write_model(workspace, outcome.model, outcome.blocks, pipeline, folder)
            else:
                workspace.copy_weights(folder)
        except ValueError as e:
            raise ValueError(f"stages.{step.first} ({stage.method}): {e}") from e
        workspace.write_log([dict(e) for e in outcome.events])
        _save_results(workspace.folder, outcome)
        artifact = Artifact(workspace.folder)
        artifact.save_result(
            "compress", account(start, task.device, pipeline.recipe.seed, earlier=before, simulated=False)
        )
        workspace.finish(config, folder, carried=before, describe=describe)


def help_model_step(pipeline: Pipeline, step: Step, before: Path | None, report: Report) -> None:
    """Take part in a stage that trains, in a process that is not the first of its launch. Nothing is written.

    Args:
        pipeline: the recipe's.
        step: that of the stage.
        before: the folder that the step before has written; None for the original model.
        report: called with events of progress.

    Raises:
        ValueError: if the stage cannot treat the model.
    """
    stage, partial = _stage(step), partial_folder(step.output)
    torch.manual_seed(pipeline.recipe.seed)
    folder = before or pipeline.source.folder
    with torch.set_grad_enabled(stage.needs.gradients):
        stage.apply(_task(pipeline, stage, folder, partial, scratch_folder(partial), report))


def _stage(step: Step) -> ModelStage:
    (stage,) = step.stages
    assert isinstance(stage, ModelStage)
    return stage


def _task(
    pipeline: Pipeline, stage: ModelStage, folder: Path, artifact: Path, scratch: Path, report: Report
) -> ModelTask:
    recipe = pipeline.recipe
    windows = pipeline.windows if stage.needs.calibration else None
    device, original = device_of(recipe), pipeline.source.folder
    return ModelTask(folder, original, windows, device, recipe.seed, scratch, artifact, report, pipeline.trust)


def _config_after(folder: Path, outcome: ModelOutcome, trust: Trust) -> dict[str, Any]:
    """Return config.json with the keys that a stage changed, and without those that it removed."""
    config = {**read_config(folder, trust=trust)[0], **outcome.config}
    if outcome.model is not None or outcome.shards:
        config.pop("quantization_config", None)  # of weights that were decoded
    return {k: v for k, v in config.items() if v is not None or k not in outcome.config}


def _save_results(folder: Path, outcome: ModelOutcome) -> None:
    for name, result in outcome.results.items():
        Artifact(folder).save_result(name, result)


@torch.no_grad()
def _write_shards(workspace: Workspace, shards: Sequence[Callable[[], Mapping[str, Tensor]]], report: Report) -> None:
    """Compute and write the shards that an interrupted run has not finished."""
    workspace.shards = len(shards)
    for i, compute in enumerate(shards):
        if not workspace.is_finished(i):
            tensors = compute()
            check_finite_weights(tensors)
            workspace.write_shard(i, tensors, [])
        report({"event": "work", "done": i + 1, "total": len(shards)})


@torch.no_grad()
def _write_model(
    workspace: Workspace, model: PreTrainedModel, numbers: Sequence[int] | None, pipeline: Pipeline, folder: Path
) -> dict[str, Any]:
    """Write a model, a shard a block and one for the rest, in the dtypes of the source. Codes are written as they are.

    Extra tensors of the source follow in shards of their own.

    Args:
        workspace: to write to.
        model: the model.
        numbers: numbers of the blocks that it has of the checkpoint's; None for all of them.
        pipeline: names the original, whose files are laid out as an unquantized model's.
        folder: the checkpoint that the model was made from.

    Returns:
        Keys of config.json that describe the quantization.
    """
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    skeleton, checkpoint = _layout(pipeline.source.folder if quantized else folder, pipeline.trust)
    dtype, blocks = main_dtype(checkpoint), find_blocks(skeleton)
    present = model.state_dict().keys()
    # Only the remaining experts make a stack.
    remaining = {n: s for n, s in checkpoint.tensors.items() if n in present or s.index is None}
    stacks = {n: s for n, s in checkpoint.stacks.items() if n in present}
    checkpoint = replace(checkpoint, tensors=remaining, stacks=stacks)
    count = len(list(model.get_submodule(blocks).children()))
    extra = extra_names(checkpoint, skeleton)
    of_extra = extra_shards(checkpoint, extra)
    workspace.shards = count + 1 + len(of_extra)
    shards: list[dict[str, Tensor]] = [{} for _ in range(count + 1)]
    for name, tensor in _stored(model, checkpoint).items():
        number = name.removeprefix(f"{blocks}.").partition(".")[0] if name.startswith(f"{blocks}.") else count
        linear, _, leaf = name.rpartition(".")
        if linear not in quantized or leaf == "bias":
            source = checkpoint.tensors.get(name)
            tensor = tensor.to(DTYPES.get(source.dtype, dtype) if source else dtype)
        shards[int(number)][name] = tensor
    schemes = {n: linear.scheme for n, linear in quantized.items()}
    config = _quantization(schemes, skeleton, checkpoint, extra) if schemes else {}
    for tensors in shards:
        check_finite_weights(tensors)
    for i, tensors in enumerate(shards):
        workspace.write_shard(i, to_file_layout(checkpoint, tensors), [])
    names_of_blocks = (blocks, blocks.removeprefix(f"{skeleton.base_model_prefix}."))
    before = len(list(skeleton.get_submodule(blocks).children()))
    for i, names in enumerate(of_extra, count + 1):
        tensors = load_extra(checkpoint, names)
        if numbers is not None:
            tensors = renumber_blocks(tensors, names_of_blocks, numbers, before)
        workspace.write_shard(i, tensors, [])
    return config


def _quantization(
    schemes: Mapping[str, Scheme], skeleton: PreTrainedModel, checkpoint: Checkpoint, extra: Sequence[str]
) -> dict[str, Any]:
    linears, ignored = [*linears_of(skeleton), *sorted(dissect(skeleton).routers)], extra_linears(checkpoint, extra)
    return {"quantization_config": quantization_config(schemes, linears, skeleton, checkpoint, ignored)(schemes)}


def _layout(folder: Path, trust: Trust) -> tuple[PreTrainedModel, Checkpoint]:
    """Return a skeleton, and the checkpoint that says how files name and lay out its parameters."""
    source = open_input(str(folder), trust=trust)
    skeleton = build_skeleton(source.config, source.dtype, trust=trust)
    return skeleton, arrange(source.checkpoint, skeleton)


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return parameters and the buffers that files hold, by name; tied ones once, by the name that the file has."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(tensor, []).append(name)
    tensors = checkpoint.tensors
    parameters = {next((n for n in same if n in tensors), same[0]): t.detach() for t, same in names.items()}
    return parameters | {n: t for n, t in model.named_buffers() if n in tensors}
