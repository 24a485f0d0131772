"""One model stage of a recipe: hand it the model as earlier steps left it, write what it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.artifact.workspace import Workspace, partial_folder, scratch_folder
from laconic.checkpoint.files import DTYPES, Checkpoint, open_checkpoint, read_json
from laconic.checkpoint.layout import arrange, to_file_layout
from laconic.checkpoint.source import build_skeleton, main_dtype, read_config
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.pipeline.provenance import account
from laconic.pipeline.walking import device_of
from laconic.recipe import Recipe
from laconic.stages.model import ModelStage, ModelTask
from laconic.structure.anatomy import find_blocks
from laconic.train.ranks import is_main
from laconic.walk.span import span


def run_model_step(
    stage: ModelStage,
    first: int,
    recipe: Recipe,
    folder: Path,
    original: Path,
    windows: Tensor | None,
    output: Path,
    identity: Mapping[str, Any],
    *,
    before: Path | None,
    overwrite: bool,
    report: Callable[[Mapping[str, Any]], None],
    trust: Trust = UNTRUSTED,
    describe: Callable[[Path], None] = lambda _: None,
) -> Artifact:
    """Let `stage`, number `first` of the recipe, apply the model in `folder`, and write it to `output`; only help with
    the former where this is not the first process of a launch. before: the artifact of the step before, if there is
    one. describe: writes the cards into the folder. The rest is as in `ModelTask`.
    """
    begun = time.monotonic()
    torch.manual_seed(recipe.seed)
    device = device_of(recipe)

    def work_in(artifact: Path, scratch: Path) -> ModelTask:
        seen = windows if stage.needs.calibration else None
        return ModelTask(folder, original, seen, device, recipe.seed, scratch, artifact, report, trust)

    if not is_main():
        stage.apply(work_in(partial_folder(output), scratch_folder(partial_folder(output))))
        return Artifact(output)
    with Workspace(output, identity, 0, overwrite=overwrite) as workspace:
        try:
            with span(stage.method):
                made = stage.apply(work_in(workspace.folder, workspace.scratch))
        except ValueError as e:
            raise ValueError(f"stages.{first} ({stage.method}): {e}") from e
        if made.model is None:
            workspace.copy_weights(folder)
        else:
            _write_model(workspace, made.model, _layout(folder, trust))
        workspace.write_log([dict(e) for e in made.events])
        artifact = Artifact(workspace.folder)
        for name, result in made.results.items():
            artifact.save_result(name, result)
        artifact.save_result("compress", account(begun, device, recipe.seed, earlier=before, simulated=False))
        config = {**read_json(folder / "config.json"), **made.config}
        told = {k: v for k, v in config.items() if v is not None or k not in made.config}
        return Artifact(workspace.finish(told, folder, carried=before, describe=describe))


def _layout(folder: Path, trust: Trust) -> Checkpoint:
    """The checkpoint that says how files name and lay out what the model holds."""
    _, config = read_config(folder, trust=trust)
    checkpoint = open_checkpoint(folder)
    return arrange(checkpoint, build_skeleton(config, main_dtype(checkpoint), trust=trust))


@torch.no_grad()
def _write_model(workspace: Workspace, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """A shard a block, and one for the rest, in the dtypes of the source."""
    dtype, blocks = main_dtype(checkpoint), find_blocks(model)
    there = model.state_dict().keys()
    # Of experts only those that are left make a stack.
    left = {n: s for n, s in checkpoint.tensors.items() if n in there or s.index is None}
    checkpoint = replace(checkpoint, tensors=left)
    count = len(list(model.get_submodule(blocks).children()))
    workspace.shards = count + 1
    shards: list[dict[str, Tensor]] = [{} for _ in range(count + 1)]
    for name, tensor in _stored(model, checkpoint).items():
        source = checkpoint.tensors.get(name)
        number = name.removeprefix(f"{blocks}.").partition(".")[0] if name.startswith(f"{blocks}.") else count
        shards[int(number)][name] = tensor.to(DTYPES.get(source.dtype, dtype) if source else dtype)
    for i, tensors in enumerate(shards):
        workspace.write_shard(i, to_file_layout(checkpoint, tensors), [])


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameters and the buffers that files hold, by name; tied ones once, by the name that the file has for them."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(tensor, []).append(name)
    known = checkpoint.tensors
    found = {next((n for n in own if n in known), own[0]): t.detach() for t, own in names.items()}
    return found | {n: t for n, t in model.named_buffers() if n in known}
