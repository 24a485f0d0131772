"""Importance by the paper's own sums, and the choice of units by trying all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.methods.llm_pruner.saliency import choose_units, pool, taylor_terms, unit_importance


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("aggregation", ["element", "vector"])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_units_weigh_what_the_papers_sums_say(axis: int, second: bool, aggregation: str) -> None:
    W, G, F = noise(6, 4), noise(6, 4, seed=1), noise(6, 4, seed=2).square()
    channels = torch.tensor([[0, 3], [1, 2]])
    found = unit_importance(taylor_terms(W, G, F if second else None), axis, channels, aggregation)
    for unit in range(2):
        expected = 0.0
        for c in channels[unit].tolist():
            line = []
            for other in range(4 if axis == 0 else 6):
                i, j = (c, other) if axis == 0 else (other, c)
                # L(w) - L(0) = g w - 1/2 h w^2, with the Fisher diagonal in place of h.
                line.append(float(W[i, j] * G[i, j] - (0.5 * F[i, j] * W[i, j] ** 2 if second else 0)))
            expected += sum(abs(x) for x in line) if aggregation == "element" else abs(sum(line))
        assert float(found[unit]) == pytest.approx(expected)


def test_pooling_is_what_it_is_called() -> None:
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    assert [pool(parts, how).tolist() for how in ("sum", "mean", "max")] == [[4, 6], [2, 3], [3, 5]]


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=4),
    st.floats(0, 0.95),
    st.integers(0, 99),
)
def test_a_cut_keeps_the_best_of_each_group_and_comes_close(
    groups: list[tuple[int, int, int]], share: float, seed: int
) -> None:
    importance = [noise(units, seed=seed + i).abs() for i, (units, _, _) in enumerate(groups)]
    sizes, steps = [size for _, size, _ in groups], [min(step, units) for units, _, step in groups]
    total = sum(units * size for units, size, _ in groups)
    masks = choose_units(importance, sizes, steps, round(share * total))
    gone = 0
    for values, mask, size, step in zip(importance, masks, sizes, steps, strict=True):
        assert mask.any()
        assert mask.all() or int(mask.sum()) % step == 0
        if not mask.all():
            assert values[mask].min() >= values[~mask].max()
        gone += int((~mask).sum()) * size
    assert gone <= round(share * total) + max(s * st_ for s, st_ in zip(sizes, steps, strict=True)) / 2


def test_a_cut_takes_what_costs_least_a_parameter() -> None:
    cheap, dear = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0])
    masks = choose_units([cheap, dear], [1, 10], [1, 1], 12)
    # 10/10 and 1/1 cost least, then 2/1.
    assert masks[0].tolist() == [False, False, True, True]
    assert masks[1].tolist() == [False, True]
