"""Zeros of pruned weights, which no later stage of the recipe may fill in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.runtime.linear import QLinear
from laconic.stages.linear import WeightStage


@dataclass(frozen=True)
class ZeroMask:
    """The zeros of one pruned weight.

    Attributes:
        mask: (out, in) bool, True where the weight is zero.
        method: that pruned it.
    """

    mask: Tensor
    method: str


def check_zeros(
    module: nn.Module, prefix: str, masks: Mapping[str, ZeroMask], stage: WeightStage, linears: Iterable[str]
) -> dict[str, ZeroMask]:
    """Check that a stage has left all zeros of earlier stages.

    Args:
        module: that holds the linears.
        prefix: name of the module in the model; empty for the model itself.
        masks: zeros of earlier stages, by name of the linear within the module.
        stage: that has treated the module.
        linears: that it has treated.

    Returns:
        The masks, and those of the stage itself if it prunes and leaves dense weights.

    Raises:
        ValueError: if the stage has filled in a zero.
    """
    for linear, zeros in masks.items():
        filled = int((_weight(module, linear)[zeros.mask] != 0).sum())
        if filled:
            name = f"{prefix}.{linear}" if prefix else linear
            raise ValueError(
                f"{name}: {stage.method} has filled in {filled} of the zeros of {zeros.method}; list it before "
                f"{zeros.method}, or ignore the linear in one of them, and pass --overwrite"
            )
    pruned = linears if stage.prunes and not stage.quantizes else ()
    return {**masks, **{n: ZeroMask(_weight(module, n) == 0, stage.method) for n in pruned}}


def sparsity(weight: Tensor) -> float:
    """Return the share of a weight's elements that are zero, to four decimals.

    Args:
        weight: of any shape, not empty.
    """
    return round(float((weight == 0).float().mean()), 4)


def _weight(module: nn.Module, name: str) -> Tensor:
    linear = module.get_submodule(name)
    if isinstance(linear, QLinear):
        return linear.decode(torch.float32) if linear.dense is None else linear.dense
    assert isinstance(linear, nn.Linear)
    return linear.weight.data
