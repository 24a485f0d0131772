"""Checks of `laconic bench sparsity` that need the models, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from laconic.artifact.artifact import Artifact
from laconic.bench.models import check_prompt, short_names
from laconic.bench.options import SparsityOptions
from laconic.bench.shapes import PRESETS, narrowed
from laconic.checkpoint.source import build_skeleton, model_folder, read_config
from laconic.structure.anatomy import linears_of


def check_models(models: Sequence[str], parts: Sequence[str], options: SparsityOptions) -> None:
    """Check that the named models fit the options, before a model is opened.

    Args:
        models: Folders, names on the Hub, or presets.
        parts: Parts to measure, of `options.PARTS`.
        options: Options of the benchmark.

    Raises:
        ValueError: Whole models are measured but none is named; a preset or a model with `--scaled` has another model
            beside it; `--baseline` or `--scaled` comes without a model.
    """
    if "models" in parts and not models:
        raise ValueError(f"name models to measure: folders, or one of {', '.join(PRESETS)}")
    presets = [m for m in models if m in PRESETS]
    if (presets or options.scaled_to is not None) and (len(models) > 1 or options.baseline):
        raise ValueError("a preset, or a model with --scaled, has random weights; name no other model beside it")
    if not models and (options.baseline or options.scaled_to is not None):
        raise ValueError(f"{'--baseline' if options.baseline else '--scaled'} goes with a model; name one before it")


def check_folders(folders: Sequence[str], options: SparsityOptions) -> None:
    """Check that models can be compared, and that their results can be saved.

    Args:
        folders: Folders or names on the Hub, the baseline among them.
        options: Options of the benchmark.

    Raises:
        ValueError: The prompt does not fit the context of a model, a result cannot be saved, or the vocabularies
            differ.
    """
    vocabularies = set()
    for folder_name, name in short_names(folders).items():
        folder = model_folder(folder_name, trust=options.trust)
        _, config = read_config(folder, trust=options.trust)
        check_prompt(name, config, options.prompt)
        vocabularies.add(config.get_text_config().vocab_size)
        artifact = Artifact(folder)
        if artifact.recipe is not None:
            artifact.check_results()
    if len(vocabularies) > 1:
        raise ValueError("these models have different vocabularies; name one original and artifacts made of it")


def check_random_model(name: str, config: PretrainedConfig, options: SparsityOptions) -> None:
    """Check that a model of random weights can be pruned as the options say.

    Args:
        name: Name of the model, for error messages.
        config: Its config.
        options: Options of the benchmark.

    Raises:
        ValueError: The prompt does not fit the context, a share of the widths cannot be removed, or the size of blocks
            does not divide a linear.
    """
    check_prompt(name, config, options.prompt)
    for s in options.sparsities if "structured" in options.kinds else ():
        narrowed(config, s)
    model = build_skeleton(config, torch.bfloat16, trust=options.trust)
    shapes = {tuple(m.weight.shape) for m in linears_of(model).values() if m is not model.get_output_embeddings()}
    block = options.block
    for rows, columns in sorted(shapes) if "block" in options.kinds else ():
        if rows % block or columns % block:
            raise ValueError(
                f"--block {block} does not divide the {rows} x {columns} of a linear of this model; take a smaller "
                "one, another --scaled, or leave block out of --kinds"
            )
