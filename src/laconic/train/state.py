"""How far a training has come, on disk: one file, whole or not there, which any number of processes can go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from laconic.checkpoint.atomic import write_file

State = dict[str, Tensor]
"""Trained parameters by name, whole and on the CPU."""
_FILE = "training.pt"


@dataclass(frozen=True)
class Progress:
    """After `step` steps. identity: what the training is of. moments: the optimizer's, of each parameter in order."""

    identity: Mapping[str, Any]
    step: int = 0
    parameters: State = field(default_factory=dict)
    moments: list[State] = field(default_factory=list)
    best_parameters: State = field(default_factory=dict)
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    def stopped(self, patience: int | None) -> bool:
        """Whether so many measurements have gone by without a new best."""
        return patience is not None and sum(m["step"] > self.best_step for m in self.held_out) >= patience


def write(folder: Path, progress: Progress) -> None:
    """Keep it in place of what was kept before."""
    told = {f.name: getattr(progress, f.name) for f in dataclasses.fields(progress)}
    write_file(folder / _FILE, lambda file: torch.save(told, file))


def read(folder: Path, identity: Mapping[str, Any]) -> Progress | None:
    """What was kept there. Raises: ValueError when that is of another training."""
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        progress = Progress(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # whatever a damaged file trips torch over
        raise ValueError(f"{file} is damaged; delete it, and run the same command: the training begins anew") from e
    differing = [key for key in identity if identity[key] != progress.identity.get(key)]
    if differing:
        what = "the data has changed" if "data" in differing else "it was launched on another number of processes"
        raise ValueError(
            f"the training in {folder} cannot go on: {what} since it began; put that back, or pass --overwrite"
        )
    return progress


def state_of(parameters: Mapping[str, Tensor]) -> State:
    """Copies of the parameters, fetched from all processes."""
    return {name: whole(p).clone() for name, p in parameters.items()}


def whole(t: Tensor | float) -> Tensor:
    """A tensor on the CPU, in one piece."""
    if isinstance(t, DTensor):
        t = t.full_tensor()
    return torch.as_tensor(t).detach().cpu()


@torch.no_grad()
def load_parameters(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Give the parameters these values."""
    for name, p in parameters.items():
        p.copy_(_as(state[name], p))


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: list[State]
) -> None:
    """Give an optimizer that has made no step yet its moments back."""
    for p, kept in zip(parameters.values(), moments, strict=True):
        # The count of steps is the one number that stays on the CPU.
        optimizer.state[p] = {k: _as(v, p) if v.dim() else v.clone() for k, v in kept.items()}


def _as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where, and cut as, another is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
