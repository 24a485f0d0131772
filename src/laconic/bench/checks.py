"""What `laconic bench sparsity` cannot do, told before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from laconic.artifact.artifact import Artifact
from laconic.bench.forms import KINDS
from laconic.bench.models import check_prompt, names
from laconic.bench.shapes import PRESETS, narrower
from laconic.checkpoint.source import build_skeleton, model_folder, read_config
from laconic.structure.anatomy import linears_of

PARTS = ("linears", "models")


def check_asked(
    parts: Sequence[str],
    models: Sequence[str],
    sparsities: Sequence[float],
    kinds: Sequence[str],
    batches: Sequence[int],
    block: int,
    prompt: int,
    sequences: int,
    scaled_to: int | None,
    baseline: str | None,
    seconds: float,
) -> None:
    """Raises: ValueError for what is wrong whatever the models are."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--measure {part} is not one of {', '.join(PARTS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind} is not one of {', '.join(KINDS)}")
    for s in sparsities:
        if not 0 < s < 1:
            raise ValueError(f"--sparsity {s} is not between 0 and 1; give the share that is gone, as in 0.5")
    for option, number in (("--batch", min(batches, default=0)), ("--prompt", prompt), ("--sequences", sequences)):
        if number < 1:
            raise ValueError(f"{option} {number} is less than 1")
    if block < 16 or block & (block - 1):
        raise ValueError(f"--block {block} is no power of two from 16 on; take 32, 64 or 128")
    if "models" in parts and not models:
        raise ValueError(f"name models to measure: folders, or one of {', '.join(PRESETS)}")
    presets = [m for m in models if m in PRESETS]
    if (presets or scaled_to is not None) and (len(models) > 1 or baseline):
        raise ValueError(
            "a preset, or a model with --scaled, has random weights and stands alone; name nothing beside it"
        )
    if not models and (baseline or scaled_to is not None):
        raise ValueError(f"{'--baseline' if baseline else '--scaled'} goes with a model; name one before it")
    if not seconds >= 0:
        raise ValueError(f"--seconds {seconds:g} is no time to measure in; give 0 or more")


def check_folders(folders: Sequence[str], prompt: int) -> None:
    """Raises: ValueError for models that cannot be measured side by side, or could not keep the result."""
    known = set()
    for name, short in names(folders).items():
        folder = model_folder(name)
        _, config = read_config(folder)
        check_prompt(short, config, prompt)
        known.add(config.get_text_config().vocab_size)
        artifact = Artifact(folder)
        if artifact.recipe is not None:
            artifact.check_results()
    if len(known) > 1:
        raise ValueError("these models have different vocabularies; name one original and artifacts made of it")


def check_made_up(
    name: str, config: PretrainedConfig, prompt: int, sparsities: Sequence[float], block: int, kinds: Sequence[str]
) -> None:
    """Raises: ValueError when a model of this config cannot be pruned as was asked."""
    check_prompt(name, config, prompt)
    for s in sparsities if "structured" in kinds else ():
        narrower(config, s)
    model = build_skeleton(config, torch.bfloat16)
    shapes = {tuple(m.weight.shape) for m in linears_of(model).values() if m is not model.get_output_embeddings()}
    for rows, columns in sorted(shapes) if "block" in kinds else ():
        if rows % block or columns % block:
            raise ValueError(
                f"--block {block} does not divide the {rows} x {columns} of a linear of this model; take a smaller "
                "one, another --scaled, or leave block out of --kinds"
            )
