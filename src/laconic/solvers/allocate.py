"""Which of many things gets how many bits, or keeps how many weights: the least total error within a budget."""

from __future__ import annotations

from collections.abc import Sequence


def allocate(errors: Sequence[Sequence[float]], costs: Sequence[float], budget: float) -> list[int]:
    """Choose for each thing one of its candidates, so that the sum of costs stays within the budget.

    errors: of every thing with every candidate. costs: of the candidates, rising. budget: for all things together.
    Starts from the cheapest and buys, again and again, the step that lowers the error most for what it costs, steps
    being taken along the convex hull of each thing's errors (the Lagrangian's solution, Shoham and Gersho 1988; what is
    left over is less than one step).

    Returns: the chosen candidate of each. Raises: ValueError when even the cheapest do not fit.
    """
    if len(errors) * costs[0] > budget + 1e-9:
        raise ValueError(f"a budget of {budget / len(errors):g} bits is less than the fewest there are, {costs[0]:g}")
    chosen, spent = [0] * len(errors), len(errors) * costs[0]
    while True:
        best: tuple[float, int, int] | None = None
        for i, own in enumerate(errors):
            at = chosen[i]
            for j in range(at + 1, len(costs)):
                price = costs[j] - costs[at]
                gain = (own[at] - own[j]) / price
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
    """What share of each thing goes, so that errors add up to the least and the mean over all weights is `mean`.

    errors: of every thing at each of the sparsities, which fall. sizes: weights of each. Errors are taken to be linear
    in between, and the hull below them convex; then the budget goes down the steepest stretches first, and the last of
    them is taken in part.

    Returns: the sparsities, each between the first and the last. Raises: ValueError when the mean is not.
    """
    if not sparsities[-1] - 1e-9 <= mean <= sparsities[0] + 1e-9:
        raise ValueError(f"a mean sparsity of {mean:g} is not between {sparsities[-1]:g} and {sparsities[0]:g}")
    stretches = [
        (gain / size, i, length)
        for i, (own, size) in enumerate(zip(errors, sizes, strict=True))
        for gain, length in _hull(own, sparsities)
    ]
    found, left = [sparsities[0]] * len(errors), (sparsities[0] - mean) * sum(sizes)
    # Sorted by gain alone, and stable: a thing's own stretches keep their order among equals.
    for _, i, length in sorted(stretches, key=lambda stretch: -stretch[0]):
        taken = min(length, left / sizes[i])
        found[i] -= taken
        left -= taken * sizes[i]
    return found


def _hull(errors: Sequence[float], sparsities: Sequence[float]) -> list[tuple[float, float]]:
    """The lower convex hull: (fall of the error by share kept, length) of its stretches, ever flatter."""
    found, at = [], 0
    while at < len(errors) - 1:
        ahead = range(at + 1, len(errors))
        gain, to = max(((errors[at] - errors[k]) / (sparsities[at] - sparsities[k]), k) for k in ahead)
        found.append((gain, sparsities[at] - sparsities[to]))
        at = to
    return found


def owl_sparsities(outliers: Sequence[float], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
    """Sparsities of blocks by their share of outliers (OWL, arXiv 2310.05175): what is kept rises with it, over a
    range of twice `spread` (lambda), around the mean over all weights.

    outliers: D of each block. sizes: weights of each. Returns: the sparsity of each.
    """
    low, high = min(outliers), max(outliers)
    lifted = [2 * spread * (D - low) / (high - low) if high > low else 0.0 for D in outliers]
    middle = sum(x * size for x, size in zip(lifted, sizes, strict=True)) / sum(sizes)
    return [mean - (x - middle) for x in lifted]
