"""Building a model of other sizes from tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.files import first_line
from laconic.checkpoint.source import build_skeleton
from laconic.structure.widths import make_config


def rebuild_model(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a config.json describes, with given parameters and buffers.

    Args:
        raw: Contents of config.json.
        tensors: Parameters and buffers by name; tied parameters are one tensor under several names.
        dtype: Dtype with which the model is built.

    Returns:
        The model in evaluation mode, on the device of the tensors.

    Raises:
        ValueError: transformers rejects the config, or builds parameters of other shapes.
    """
    model = build_empty_model(raw, dtype)
    parameters: dict[int, nn.Parameter] = {}
    for name, expected in list(model.named_parameters(remove_duplicate=False)):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != expected.shape:
            shape = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} would be {tuple(expected.shape)} by config.json, and is {shape}")
        path, _, leaf = name.rpartition(".")
        loaded = parameters.setdefault(id(tensor), nn.Parameter(tensor.detach(), requires_grad=False))
        setattr(model.get_submodule(path), leaf, loaded)
    for name, buffer in model.named_buffers():
        if name in tensors and tensors[name].shape == buffer.shape:
            buffer.copy_(tensors[name])
    module: nn.Module = model
    module.to(next(iter(parameters.values())).device)
    model.tie_weights()
    module.eval()
    return model


def build_empty_model(raw: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a config.json describes, with parameters on the meta device.

    Args:
        raw: Contents of config.json.
        dtype: Dtype of the parameters.

    Returns:
        The model in evaluation mode, with real buffers.

    Raises:
        ValueError: transformers rejects the config.
    """
    try:
        return build_skeleton(make_config(raw), dtype)
    except Exception as e:
        raise ValueError(f"transformers takes no config with such sizes: {first_line(e)}") from e


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names.

    Args:
        model: The model.
    """
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
