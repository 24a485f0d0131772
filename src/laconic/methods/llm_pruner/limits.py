"""Limits of structured pruning: units are removed in steps, and some units of every group remain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupLimits:
    """Limits of a group.

    Attributes:
        unit_size: Parameters of a unit.
        units: Number of units.
        min_units: Number of units that remain at least.
        step: Number of units removed at once.
        fixed: Whether exactly `min_units` remain, by the recipe.
    """

    unit_size: int
    units: int
    min_units: int
    step: int
    fixed: bool = False


def check_sparsity(sparsity: float, groups: Sequence[GroupLimits]) -> None:
    """Check that a sparsity can be reached.

    Args:
        sparsity: Share of the parameters of all groups to remove.
        groups: Limits of the groups.

    Raises:
        ValueError: It is more than can be removed, or less than one step.
    """
    total = sum(g.unit_size * g.units for g in groups)
    removable = sum(g.unit_size * (g.units - g.min_units) for g in groups)
    steps = [g.unit_size * g.step for g in groups]
    if sparsity and removable < sparsity * total - max(steps) / 2:
        raise ValueError(
            f"sparsity {sparsity} cannot be reached, since a part of every group must remain; use at most "
            f"{math.floor(1e4 * removable / total) / 1e4:g}"
        )
    if 0 < sparsity * total < min(steps) / 2 and not any(g.fixed for g in groups):
        raise ValueError(
            f"sparsity {sparsity} is less than one head, or step of channels; use "
            f"{math.ceil(1e4 * min(steps) / total) / 1e4:g} or more"
        )
