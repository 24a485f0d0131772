"""Importance of units: the change of the loss without them, by its Taylor series (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["element", "vector"]
Pooling = Literal["sum", "mean", "max"]


def taylor_terms(w: Tensor, g: Tensor, F: Tensor | None = None) -> Tensor:
    """Estimate the decrease of the loss when each weight becomes zero.

    First order: w g (eq. 4 and 5). Second order: w g - 1/2 w^2 F, with the diagonal of the Fisher information in place
    of the Hessian's.

    Args:
        w: Weights.
        g: Mean gradient of the loss, of the same shape.
        F: Mean square of the gradients, of the same shape; None for first order.

    Returns:
        A term per weight, with its sign.
    """
    return w * g if F is None else w * g - 0.5 * w.square() * F


def unit_importance(terms: Tensor, axis: int, channels: Tensor, aggregation: Aggregation) -> Tensor:
    """Compute the importance of each unit's part of one matrix.

    Args:
        terms: (out, in), of `taylor_terms`.
        axis: 0 if rows belong to units, 1 if columns do.
        channels: (units, n), the rows or columns of each unit.
        aggregation: `element` sums the absolute terms of single weights (eq. 5); `vector` takes the absolute sum of the
            terms of a row or column (eq. 4).

    Returns:
        (units,) float64.
    """
    lines = terms.double() if axis == 0 else terms.double().T
    by_channel = lines.abs().sum(1) if aggregation == "element" else lines.sum(1).abs()
    return by_channel[channels.to(by_channel.device)].sum(1)


def pool(parts: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Combine the importance of the parts of units, one part per matrix.

    Args:
        parts: (units,) of every matrix.
        pooling: How the parts are combined.

    Returns:
        (units,).
    """
    stacked = torch.stack(list(parts))
    match pooling:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)


def choose_units(
    importance: Sequence[Tensor], unit_sizes: Sequence[int], steps: Sequence[int], target: int
) -> list[Tensor]:
    """Choose the units of several groups that remain, removing the least importance per parameter.

    Args:
        importance: (units,) of each group.
        unit_sizes: Parameters of a unit of each group.
        steps: Number of units of each group removed at once; the number that remains is a multiple of it, and not zero.
        target: Number of parameters to remove, about.

    Returns:
        (units,) bool of each group, True for units that remain.
    """
    orders = [i.argsort(stable=True) for i in importance]
    candidates = []
    for group, (values, order, size, step) in enumerate(zip(importance, orders, unit_sizes, steps, strict=True)):
        ends = [n - remaining for n in [len(values)] for remaining in range((n - 1) // step * step, 0, -step)]
        for start, end in zip([0, *ends], ends, strict=False):
            cost = float(values[order[start:end]].sum()) / ((end - start) * size)
            candidates.append((cost, group, end, (end - start) * size))
    removed_size, removed_units = 0, [0] * len(orders)
    finished = set[int]()
    # Costs rise within a group, except perhaps after its first, shorter step; steps are taken in order in any case.
    for _, group, end, size in sorted(_with_rising_costs(candidates)):
        if group not in finished and removed_size + size / 2 <= target:
            removed_size, removed_units[group] = removed_size + size, end
        else:
            finished.add(group)
    masks = []
    for order, n in zip(orders, removed_units, strict=True):
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[:n].cpu()] = False
        masks.append(mask)
    return masks


def _with_rising_costs(candidates: Sequence[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """Raise the cost of each step to at least that of the earlier steps of its group."""
    highest: dict[int, float] = {}
    out = []
    for cost, group, end, size in candidates:
        highest[group] = max(cost, highest.get(group, cost))
        out.append((highest[group], group, end, size))
    return out
