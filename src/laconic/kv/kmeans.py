"""Weighted k-means of numbers on a line: the levels of a non-uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor


def levels(x: Tensor, count: int, weight: Tensor | None = None, *, steps: int = 40) -> Tensor:
    """Levels (count,), rising, that lower sum(weight * (x - nearest level)^2): Lloyd's steps from weighted quantiles.

    x: (n,) float32. weight: (n,), positive, or None for all alike. Deterministic.
    """
    x, order = x.float().sort()
    w = (torch.ones_like(x) if weight is None else weight.float()[order]).double()
    mass, moment = w.cumsum(0), (w * x.double()).cumsum(0)
    zero = mass.new_zeros(1)
    mass, moment = torch.cat([zero, mass]), torch.cat([zero, moment])
    marks = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count * mass[-1]
    found = x[torch.searchsorted(mass[1:], marks).clamp_(max=len(x) - 1)].double()
    for _ in range(steps):
        # The numbers nearest to a level are a run of the sorted ones, and sums over runs are differences.
        edges = torch.searchsorted(x.double(), (found[1:] + found[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
        inside = mass[edges[1:]] - mass[edges[:-1]]
        mean = (moment[edges[1:]] - moment[edges[:-1]]) / inside.clamp(min=1e-30)
        moved = torch.where(inside > 0, mean, found)
        if torch.equal(moved, found):
            break
        found = moved
    return found.float().sort().values
