"""Low-rank adapters in peft's format that stand beside a model's weights: read from disk, and applied in the forward.

Layers and files for training them are in `methods.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.checkpoint.files import ADAPTER_CONFIG, read_json, wrap_read_errors
from laconic.runtime.linear import QLinear

ADAPTER = "adapter"
"""Subfolder of an artifact that holds its adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."

# Variants of LoRA whose product is another than alpha / r * B A, with the values that switch them off.
_VARIANTS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "target_parameters": ([], None),
}


class LoraLinear(nn.Module):
    """A frozen linear with an adapter: W + scale * B A.

    Args:
        base: The frozen linear.
        rank: Rank of the adapter.
        scale: Factor of the product.

    Attributes:
        base: The frozen linear.
        scale: Factor of the product.
        lora_A: (rank, in) float32.
        lora_B: (out, rank) float32.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear | QLinear)
        self.base: nn.Module = base
        device = next(base.parameters()).device
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = scale
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the output.

        Args:
            x: (..., in).

        Returns:
            (..., out) in x's dtype.
        """
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Read adapters.

    Args:
        folder: Folder of the adapters.

    Returns:
        `NAME.lora_A` (rank, in) and `NAME.lora_B` (out, rank) of each linear, and the factor alpha / rank.

    Raises:
        ValueError: The folder holds no adapter, or one of a variant that is not read.
    """
    file = folder / ADAPTER_WEIGHTS
    if not has_adapter(folder):
        raise ValueError(
            f"{folder} holds no LoRA adapter ({ADAPTER_WEIGHTS}, {ADAPTER_CONFIG}); name a folder that does"
        )
    config = read_json(folder / ADAPTER_CONFIG)
    numbers = [config.get(key) for key in ("r", "lora_alpha")] if isinstance(config, dict) else [None]
    if not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} does not say 'r' and 'lora_alpha' of an adapter, two numbers above 0; save the "
            "adapter again with peft, or name another folder"
        )
    for key, plain in _VARIANTS.items():
        if config.get(key) not in plain:
            raise ValueError(
                f"the adapter in {folder} is no plain LoRA ({key}: {config[key]}); merge it by peft "
                "(merge_and_unload), or move it away"
            )
    with wrap_read_errors(file):
        tensors = load_file(file)
    state = {n.removeprefix(ADAPTER_PREFIX).removesuffix(".weight"): t for n, t in tensors.items()}
    return state, float(config["lora_alpha"]) / float(config["r"])


def has_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter in peft's format.

    Args:
        folder: The folder.
    """
    return (folder / ADAPTER_WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file()


def adapter_folders(model: Path) -> list[Path]:
    """List the folders of the adapters that belong to a model: its own, as transformers applies it, or `adapter/`.

    Args:
        model: Folder of the model.

    Returns:
        At most both folders.

    Raises:
        ValueError: An adapter is a pickle.
    """
    folders = (model, model / ADAPTER)
    for folder in folders:
        pickled = folder / "adapter_model.bin"
        if pickled.is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
            raise ValueError(
                f"{pickled} is an adapter as a pickle, which may run code when it is read; save it again with peft as "
                f"{ADAPTER_WEIGHTS}, or move it away"
            )
    return [folder for folder in folders if has_adapter(folder)]


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter beside the linears of a model.

    Args:
        model: The model with its weights, changed in place.
        folder: Folder of the adapter.

    Raises:
        ValueError: The adapter cannot be read, or does not fit the model.
    """
    state, scale = read_adapter(folder)
    modules = dict(model.named_modules())
    for name in sorted({n.rpartition(".")[0] for n in state}):
        A, B, base = state.get(f"{name}.lora_A"), state.get(f"{name}.lora_B"), modules.get(name)
        shapes = [None if t is None else tuple(t.shape) for t in (A, B)]
        if (
            A is None
            or B is None
            or not isinstance(base, nn.Linear | QLinear)
            or shapes != [(len(A), base.in_features), (base.out_features, len(A))]
        ):
            raise ValueError(f"the adapter in {folder} does not fit the model's '{name}'; move the adapter away")
        adapted = LoraLinear(base, len(A), scale)
        adapted.lora_A.data.copy_(A)
        adapted.lora_B.data.copy_(B)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted.requires_grad_(False).eval())
