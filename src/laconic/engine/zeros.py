"""The zeros of a pruned weight, watched: no later stage of the recipe may fill them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.engine.stage import Stage
from laconic.model.linear import QLinear


@dataclass(frozen=True)
class Zeros:
    """where: (out, in) bool. method: what put them there."""

    where: Tensor
    method: str


def zeros_of(module: nn.Module, linear: str, stage: Stage) -> Zeros:
    """Of a linear that a stage has just pruned."""
    return Zeros(_weight(module, linear) == 0, stage.method)


def check_zeros(module: nn.Module, prefix: str, zeros: Mapping[str, Zeros], stage: Stage) -> None:
    """Raises: ValueError when a stage has left something else where zeros were. zeros: by name within the module."""
    for linear, known in zeros.items():
        filled = int((_weight(module, linear)[known.where] != 0).sum())
        if filled:
            name = f"{prefix}.{linear}" if prefix else linear
            raise ValueError(
                f"{name}: {stage.method} has filled in {filled} of the zeros of {known.method}; list it before "
                f"{known.method}, or ignore the linear in one of them, and pass --overwrite"
            )


def sparsity(weight: Tensor) -> float:
    """The share of a weight that is zero."""
    return round(float((weight == 0).float().mean()), 4)


def _weight(module: nn.Module, linear: str) -> Tensor:
    found = module.get_submodule(linear)
    if isinstance(found, QLinear):
        return found.decode(torch.float32) if found.dense is None else found.dense
    assert isinstance(found, nn.Linear)
    return found.weight.data
