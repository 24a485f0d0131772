"""How much of several groups of units can go, since units go in steps, and some stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """How much of a group can go. size: parameters of a unit. stays: units that do at least. step: units that go at
    once. fixed: whether `stays` is said, and not the least there may be."""

    size: int
    units: int
    stays: int
    step: int
    fixed: bool = False


def check_reach(sparsity: float, groups: Sequence[Reach]) -> None:
    """sparsity: the share of the parameters of all groups that is to go.

    Raises: ValueError when it is more than can go, or less than goes at once.
    """
    total = sum(g.size * g.units for g in groups)
    most = sum(g.size * (g.units - g.stays) for g in groups)
    steps = [g.size * g.step for g in groups]
    if sparsity and most < sparsity * total - max(steps) / 2:
        raise ValueError(
            f"sparsity {sparsity} cannot be reached, since something of every group stays; at most "
            f"{math.floor(1e4 * most / total) / 1e4:g} can go"
        )
    if 0 < sparsity * total < min(steps) / 2 and not any(g.fixed for g in groups):
        raise ValueError(
            f"sparsity {sparsity} is less than one head, or step of channels; use "
            f"{math.ceil(1e4 * min(steps) / total) / 1e4:g} or more"
        )
