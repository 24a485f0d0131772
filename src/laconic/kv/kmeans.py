"""Weighted k-means of numbers on a line: the levels of a non-uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans_levels(x: Tensor, count: int, weight: Tensor | None = None, *, steps: int = 40) -> Tensor:
    """Find levels with a small sum(weight * (x - nearest level)^2), by Lloyd's steps from weighted quantiles.

    The result is deterministic.

    Args:
        x: Numbers, (n,) float32.
        count: Number of levels.
        weight: Positive weights of the numbers, (n,); all equal if None.
        steps: Lloyd's steps at most.

    Returns:
        Levels in ascending order, (count,) float32.
    """
    x, order = x.float().sort()
    w = (torch.ones_like(x) if weight is None else weight.float()[order]).double()
    mass, moment = w.cumsum(0), (w * x.double()).cumsum(0)
    zero = mass.new_zeros(1)
    mass, moment = torch.cat([zero, mass]), torch.cat([zero, moment])
    quantiles = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count * mass[-1]
    levels = x[torch.searchsorted(mass[1:], quantiles).clamp_(max=len(x) - 1)].double()
    for _ in range(steps):
        # The numbers nearest to a level are a run of the sorted ones; sums over runs are differences of prefix sums.
        edges = torch.searchsorted(x.double(), (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
        mass_of_level = mass[edges[1:]] - mass[edges[:-1]]
        mean = (moment[edges[1:]] - moment[edges[:-1]]) / mass_of_level.clamp(min=1e-30)
        moved = torch.where(mass_of_level > 0, mean, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels.float().sort().values
