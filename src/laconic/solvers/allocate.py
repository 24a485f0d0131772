"""Allocation of a budget: bits or weights for each of several tensors, at the least total error."""

from __future__ import annotations

from collections.abc import Sequence


def allocate(errors: Sequence[Sequence[float]], costs: Sequence[float], budget: float) -> list[int]:
    """Choose one candidate for each item, so that the sum of costs stays within the budget.

    Starts with the cheapest candidate of each item, and repeatedly takes the step that lowers the error most per cost,
    along the convex hull of each item's errors. This is the solution of the Lagrangian (Shoham and Gersho 1988); the
    budget that remains is less than one step.

    Args:
        errors: Error of each item with each candidate.
        costs: Cost of each candidate, ascending.
        budget: Sum of costs allowed for all items together.

    Returns:
        Index of the chosen candidate of each item.

    Raises:
        ValueError: Even the cheapest candidates exceed the budget.
    """
    if len(errors) * costs[0] > budget + 1e-9:
        raise ValueError(f"a budget of {budget / len(errors):g} bits is less than the smallest choice, {costs[0]:g}")
    chosen, spent = [0] * len(errors), len(errors) * costs[0]
    while True:
        best: tuple[float, int, int] | None = None
        for i, item_errors in enumerate(errors):
            current = chosen[i]
            for j in range(current + 1, len(costs)):
                price = costs[j] - costs[current]
                gain = (item_errors[current] - item_errors[j]) / price
                if gain > 0 and spent + price <= budget + 1e-9 and (best is None or gain > best[0]):
                    best = (gain, i, j)
        if best is None:
            return chosen
        _, i, j = best
        spent += costs[j] - costs[chosen[i]]
        chosen[i] = j


def allocate_sparsity(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], sparsities: Sequence[float], mean: float
) -> list[float]:
    """Choose a sparsity for each item, so that the sum of errors is least and the mean over all weights is `mean`.

    Errors are interpolated linearly between the sparsities, on their lower convex hull; the budget is spent on the
    steepest segments first, and on the last of them in part.

    Args:
        errors: Error of each item at each of the sparsities.
        sizes: Number of weights of each item.
        sparsities: Sparsities at which errors were measured, descending.
        mean: Mean sparsity over all weights.

    Returns:
        The sparsity of each item, between the first and the last of `sparsities`.

    Raises:
        ValueError: The mean is outside this range.
    """
    if not sparsities[-1] - 1e-9 <= mean <= sparsities[0] + 1e-9:
        raise ValueError(f"a mean sparsity of {mean:g} is not between {sparsities[-1]:g} and {sparsities[0]:g}")
    segments = [
        (gain / size, i, length)
        for i, (item_errors, size) in enumerate(zip(errors, sizes, strict=True))
        for gain, length in _hull(item_errors, sparsities)
    ]
    allocated, budget = [sparsities[0]] * len(errors), (sparsities[0] - mean) * sum(sizes)
    # A stable sort by gain alone keeps the segments of one item in order where gains are equal.
    for _, i, length in sorted(segments, key=lambda segment: -segment[0]):
        step = min(length, budget / sizes[i])
        allocated[i] -= step
        budget -= step * sizes[i]
    return allocated


def _hull(errors: Sequence[float], sparsities: Sequence[float]) -> list[tuple[float, float]]:
    """Compute segments of the lower convex hull, steepest first: (decrease of the error per sparsity, length)."""
    segments, start = [], 0
    while start < len(errors) - 1:
        later = range(start + 1, len(errors))
        gain, end = max(((errors[start] - errors[k]) / (sparsities[start] - sparsities[k]), k) for k in later)
        segments.append((gain, sparsities[start] - sparsities[end]))
        start = end
    return segments


def owl_sparsities(outliers: Sequence[float], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
    """Choose sparsities of blocks by their shares of outliers (OWL, arXiv 2310.05175): more outliers, less sparsity.

    Args:
        outliers: Layerwise outlier distribution D of each block.
        sizes: Number of weights of each block.
        mean: Mean sparsity over all weights.
        spread: Lambda of the paper; sparsities cover a range of twice this.

    Returns:
        The sparsity of each block.
    """
    low, high = min(outliers), max(outliers)
    shifts = [2 * spread * (D - low) / (high - low) if high > low else 0.0 for D in outliers]
    mean_shift = sum(x * size for x, size in zip(shifts, sizes, strict=True)) / sum(sizes)
    return [mean - (x - mean_shift) for x in shifts]
