"""Which of many things gets how many bits: the least total error within a budget."""

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
