"""Checks of what a model stage returns: a model that could not be opened again is an error that names the stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import build_empty_model
from laconic.checkpoint.source import build_skeleton, read_config
from laconic.checkpoint.trust import Trust
from laconic.runtime.linear import QLinear
from laconic.stages.model import ModelOutcome, ModelStage


def check_model_outcome(stage: ModelStage, outcome: object) -> ModelOutcome:
    """Check that a stage returned an outcome.

    Args:
        stage: the method.
        outcome: what it returned.

    Returns:
        The outcome.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(outcome, ModelOutcome):
        raise TypeError(
            f"{type(stage).__name__}.apply() returned {type(outcome).__name__}; return "
            "laconic.stages.model.ModelOutcome(model)"
        )
    return outcome


def check_shapes(
    stage: ModelStage, outcome: ModelOutcome, config: Mapping[str, Any], folder: Path, trust: Trust
) -> None:
    """Check that parameters have the shapes that config.json tells.

    Args:
        stage: the method.
        outcome: the model that it returned, and the keys of config.json that it changed.
        config: contents of config.json after the stage.
        folder: the checkpoint before the stage.
        trust: what the files of the checkpoint may do.

    Raises:
        TypeError: if a parameter is missing, or has another shape.
        ValueError: if transformers rejects the config.
    """
    model, skeleton = outcome.model, _described(outcome, config, folder, trust)
    if model is None or skeleton is None:
        return
    codes = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, QLinear)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in skeleton.named_parameters(remove_duplicate=False):
        tensor = parameters.get(name)
        if name not in codes and (tensor is None or tensor.shape != expected.shape):
            shape = "nothing" if tensor is None else tuple(tensor.shape)
            raise TypeError(
                f"{type(stage).__name__}.apply() returned {shape} as {name}, which is {tuple(expected.shape)} by "
                "config.json; put the keys that change into ModelOutcome.config"
            )


def _described(outcome: ModelOutcome, config: Mapping[str, Any], folder: Path, trust: Trust) -> PreTrainedModel | None:
    """Return a skeleton of the model that config.json describes after a stage; None where that is not known."""
    if not outcome.config:
        before = read_config(folder, trust=trust)[1]
        if hasattr(before, "quantization_config"):
            del before.quantization_config
        return build_skeleton(before, torch.bfloat16, trust=trust)
    # Configs of a model's own code are read from its folder, which is not written yet.
    if "auto_map" in config:
        return None
    return build_empty_model({k: v for k, v in config.items() if k != "quantization_config"}, torch.bfloat16)


def check_finite_weights(tensors: Mapping[str, Tensor]) -> None:
    """Check tensors that a stage leaves, before they are written.

    Args:
        tensors: by name, any dtype; those of one byte a number are codes.

    Raises:
        ValueError: if one holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity afterwards; check the model and the texts of the stage")
