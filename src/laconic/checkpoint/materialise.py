"""Loading the parameters of a skeleton from a checkpoint, and the check that the checkpoint has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.files import DTYPES, Checkpoint
from laconic.checkpoint.layout import is_computed


def check_complete(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has every parameter of a skeleton, in its shape and in a 16- or 32-bit float dtype.

    Args:
        model: The skeleton.
        checkpoint: The arranged checkpoint.

    Raises:
        ValueError: A tensor is missing, or has another shape or dtype.
    """
    for parameter, names in _parameters(model).items():
        name = next((n for n in names if n in checkpoint.tensors), None)
        if name is None and is_computed(model, names[0]):
            raise ValueError(
                f"unsupported architecture '{model.config.model_type}': transformers computes '{names[0]}' from other "
                "tensors of its files, which Laconic cannot"
            )
        if name is None:
            raise ValueError(
                f"{checkpoint.folder} has no tensor '{names[0]}', which config.json asks for; "
                "download it again, or check that the two belong together"
            )
        stored = checkpoint.tensors[name]
        _check_shape(name, stored.shape, parameter)
        if stored.dtype not in DTYPES:
            raise ValueError(f"tensor '{name}' is {stored.dtype}; Laconic reads bf16, fp16 or fp32 weights")


def materialise(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device) -> None:
    """Load the parameters of a module that are still on the meta device.

    Args:
        module: The module, changed in place; parameters keep their dtype.
        prefix: Name of the module in the checkpoint, with a final dot; empty for the whole model.
        checkpoint: The arranged checkpoint.
        device: Device of the module afterwards.

    Raises:
        ValueError: A tensor is missing, cannot be read, holds NaN or infinity, has another shape, or holds codes where
            the model has values.
    """
    # Tied parameters have one of their names in the file, and stay one parameter.
    missing = {p: names for p, names in _parameters(module).items() if p.is_meta}
    stored = {
        p: next((n for n in names if f"{prefix}{n}" in checkpoint.tensors), names[0]) for p, names in missing.items()
    }
    tensors = checkpoint.load((f"{prefix}{n}" for n in stored.values()), device)
    for expected, names in missing.items():
        tensor = tensors.pop(f"{prefix}{stored[expected]}")
        _check_shape(f"{prefix}{stored[expected]}", tuple(tensor.shape), expected)
        _check_values(f"{prefix}{stored[expected]}", tensor, expected)
        loaded = nn.Parameter(tensor.to(expected.dtype), requires_grad=False)
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, loaded)
    module.to(device)


def _parameters(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """List the names of every parameter; a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _check_shape(name: str, shape: tuple[int, ...], expected: nn.Parameter) -> None:
    if shape != tuple(expected.shape):
        raise ValueError(
            f"tensor '{name}' has shape {shape}, config.json says {tuple(expected.shape)}; "
            "the checkpoint and its config.json do not belong together"
        )


def _check_values(name: str, tensor: Tensor, expected: nn.Parameter) -> None:
    """Check that a tensor of a 16- or 32-bit parameter holds values, not codes without their scale."""
    wide = [t.is_floating_point() and t.element_size() > 1 for t in (expected, tensor)]
    if wide == [True, False]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"tensor '{name}' holds codes ({dtype}) that config.json does not describe; add the quantization_config "
            "of the tool that wrote it, or start from the original 16-bit model"
        )
