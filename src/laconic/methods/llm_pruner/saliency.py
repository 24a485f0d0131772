"""What the loss would rise by without some weights, by Taylor's series around them (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["element", "vector"]
Pooling = Literal["sum", "mean", "max"]


def taylor(w: Tensor, g: Tensor, F: Tensor | None = None) -> Tensor:
    """How much the loss changes when a weight becomes zero, with its sign turned: w g, to first order (eq. 4 and 5), or
    w g - 1/2 w^2 F with the diagonal of the Fisher information for the Hessian's.

    w: weights, g: the loss's mean gradient, F: mean of its squares; of one shape.
    """
    return w * g if F is None else w * g - 0.5 * w.square() * F


def of_units(changes: Tensor, axis: int, channels: Tensor, aggregation: Aggregation) -> Tensor:
    """The importance of the part of a matrix that belongs to each unit, (units,).

    changes: (out, in), as from `taylor`. axis: 0 where rows belong to units, 1 where columns do. channels: (units, n).
    aggregation: `element` adds up the sizes of what single weights do (eq. 5), `vector` takes the size of what a whole
    row or column does (eq. 4).
    """
    lines = changes.double() if axis == 0 else changes.double().T
    each = lines.abs().sum(1) if aggregation == "element" else lines.sum(1).abs()
    return each[channels.to(each.device)].sum(1)


def pooled(parts: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """The importance of units of which each part has one: (units,) of every part."""
    stacked = torch.stack(list(parts))
    match pooling:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)


def cut(importance: Sequence[Tensor], sizes: Sequence[int], steps: Sequence[int], target: int) -> list[Tensor]:
    """Which units to keep of several groups, so that about `target` parameters go and the least importance a parameter.

    importance: of each group its units' (units,). sizes: parameters of a unit. steps: how many units go at once, and
    what the number that stays is a multiple of; a step stays in every group. Returns: masks (units,) of bool.
    """
    orders = [i.argsort(stable=True) for i in importance]
    offers = []
    for group, (values, order, size, step) in enumerate(zip(importance, orders, sizes, steps, strict=True)):
        ends = [n - kept for n in [len(values)] for kept in range((n - 1) // step * step, 0, -step)]
        for start, end in zip([0, *ends], ends, strict=False):
            cost = float(values[order[start:end]].sum()) / ((end - start) * size)
            offers.append((cost, group, end, (end - start) * size))
    gone, taken = 0, [0] * len(orders)
    full = set[int]()
    # Costs rise within a group but for its first, odd step; a group's steps are taken in order all the same.
    for _, group, end, size in sorted(_rising(offers)):
        if group not in full and gone + size / 2 <= target:
            gone, taken[group] = gone + size, end
        else:
            full.add(group)
    masks = []
    for order, n in zip(orders, taken, strict=True):
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[:n].cpu()] = False
        masks.append(mask)
    return masks


def _rising(offers: Sequence[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """The same, none cheaper than one that must come before it."""
    highest: dict[int, float] = {}
    out = []
    for cost, group, end, size in offers:
        highest[group] = max(cost, highest.get(group, cost))
        out.append((highest[group], group, end, size))
    return out
