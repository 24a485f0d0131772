"""The zeros of a pruned weight, watched: no later stage of the recipe may fill them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.runtime.linear import QLinear
from laconic.stages.linear import WeightStage


@dataclass(frozen=True)
class Zeros:
    """where: (out, in) bool. method: what put them there."""

    where: Tensor
    method: str


def watch_zeros(
    module: nn.Module, prefix: str, zeros: Mapping[str, Zeros], stage: WeightStage, linears: Iterable[str]
) -> dict[str, Zeros]:
    """The zeros to watch once a stage has treated these linears: those that were there, which it has kept, and its own,
    if it prunes and leaves a dense weight. zeros: by name within the module.

    Raises: ValueError when the stage has left something else where zeros were.
    """
    for linear, known in zeros.items():
        filled = int((_weight(module, linear)[known.where] != 0).sum())
        if filled:
            name = f"{prefix}.{linear}" if prefix else linear
            raise ValueError(
                f"{name}: {stage.method} has filled in {filled} of the zeros of {known.method}; list it before "
                f"{known.method}, or ignore the linear in one of them, and pass --overwrite"
            )
    made = linears if stage.prunes and not stage.quantizes else ()
    return {**zeros, **{n: Zeros(_weight(module, n) == 0, stage.method) for n in made}}


def sparsity(weight: Tensor) -> float:
    """The share of a weight that is zero."""
    return round(float((weight == 0).float().mean()), 4)


def _weight(module: nn.Module, linear: str) -> Tensor:
    found = module.get_submodule(linear)
    if isinstance(found, QLinear):
        return found.decode(torch.float32) if found.dense is None else found.dense
    assert isinstance(found, nn.Linear)
    return found.weight.data
