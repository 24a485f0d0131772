"""The state of a training on disk: one file, written whole, from which any number of processes can resume."""

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
"""Trained parameters by name, unsharded and on the CPU."""
_FILE = "training.pt"


@dataclass(frozen=True)
class Progress:
    """The progress of a training.

    Attributes:
        identity: what the training depends on; another identity cannot resume it.
        step: number of finished steps.
        parameters: after these steps, as of the last saved state.
        moments: of the optimizer, for each parameter in order.
        best_parameters: those of the lowest held-out loss; empty without held-out text.
        best_step: step of the best parameters.
        curve: figures of each step.
        held_out: step and loss of each measurement of the held-out loss.
    """

    identity: Mapping[str, Any]
    step: int = 0
    parameters: State = field(default_factory=dict)
    moments: list[State] = field(default_factory=list)
    best_parameters: State = field(default_factory=dict)
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    def stopped(self, patience: int | None) -> bool:
        """Return whether so many measurements of the held-out loss have passed without a new best.

        Args:
            patience: number of measurements; None for no limit.
        """
        return patience is not None and sum(m["step"] > self.best_step for m in self.held_out) >= patience


def write_progress(folder: Path, progress: Progress) -> None:
    """Write the progress into a folder, in place of an earlier one, atomically.

    Args:
        folder: the folder, which exists.
        progress: with unsharded tensors.
    """
    fields = {f.name: getattr(progress, f.name) for f in dataclasses.fields(progress)}
    write_file(folder / _FILE, lambda file: torch.save(fields, file))


def read_progress(folder: Path, identity: Mapping[str, Any]) -> Progress | None:
    """Read the progress that a folder holds.

    Args:
        folder: the folder.
        identity: what the training depends on.

    Returns:
        The progress, its tensors on the CPU; None if the folder holds none.

    Raises:
        ValueError: if the file is damaged, or of a training with another identity.
    """
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        progress = Progress(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # torch raises errors of many kinds for a damaged file
        raise ValueError(f"{file} is damaged; delete it, and run the same command: the training begins anew") from e
    differing = [key for key in identity if identity[key] != progress.identity.get(key)]
    if differing:
        change = "the data has changed" if "data" in differing else "it was launched on another number of processes"
        raise ValueError(
            f"the training in {folder} cannot go on: {change} since it began; put that back, or pass --overwrite"
        )
    return progress


def copy_parameters(parameters: Mapping[str, Tensor]) -> State:
    """Return copies of the parameters, gathered from all processes.

    Args:
        parameters: by name, sharded or whole.
    """
    return {name: gather(p).clone() for name, p in parameters.items()}


def gather(t: Tensor | float) -> Tensor:
    """Return a tensor on the CPU, its shards gathered from all processes.

    Args:
        t: a tensor, sharded or whole, or a number.
    """
    if isinstance(t, DTensor):
        t = t.full_tensor()
    return torch.as_tensor(t).detach().cpu()


@torch.no_grad()
def load_parameters(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Set the values of parameters.

    Args:
        parameters: by name, sharded or whole; changed in place.
        state: whole values by name, for every parameter.
    """
    for name, p in parameters.items():
        p.copy_(_placed_as(state[name], p))


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: list[State]
) -> None:
    """Set the moments of an optimizer that has not made a step yet.

    Args:
        optimizer: the optimizer.
        parameters: that it trains, in order.
        moments: of each parameter.
    """
    for p, of_parameter in zip(parameters.values(), moments, strict=True):
        # Adam's 0-dim step count stays on the CPU.
        optimizer.state[p] = {k: _placed_as(v, p) if v.dim() else v.clone() for k, v in of_parameter.items()}


def _placed_as(value: Tensor, like: Tensor) -> Tensor:
    """Return an unsharded tensor on the device of another, sharded as that is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
