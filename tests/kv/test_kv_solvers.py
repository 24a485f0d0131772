"""Levels, budgets, rotations and fixed ranges: each against its plain definition."""

from __future__ import annotations

import itertools
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.formats.rotation import hadamard
from laconic.kv.fit import fit_static
from laconic.kv.format import KvFormat, decode_kv, encode_kv
from laconic.kv.kmeans import kmeans_levels
from laconic.solvers.allocate import allocate
from laconic.solvers.rotate import balancing_rotation


def cost(x: torch.Tensor, w: torch.Tensor, found: torch.Tensor) -> float:
    return float((w * (x[:, None] - found).square().amin(1)).sum())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_levels_are_where_no_small_move_helps(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3000, generator=generator), torch.rand(3000, generator=generator) + 0.01
    found = kmeans_levels(x, count, w, steps=500)
    assert torch.equal(found, found.sort().values)
    least = cost(x, w, found)
    for i, delta in itertools.product(range(count), (-0.02, 0.02)):
        moved = found.clone()
        moved[i] += delta
        assert cost(x, w, moved) > least
    assert least < cost(x, w, torch.linspace(float(x.min()), float(x.max()), count))


def test_levels_follow_the_weights() -> None:
    x = torch.tensor([0.0, 0.1, 5.0, 5.1])
    torch.testing.assert_close(kmeans_levels(x, 2, torch.tensor([3.0, 1.0, 1.0, 1.0])), torch.tensor([0.025, 5.05]))


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(2, 8))
@settings(max_examples=60)
def test_a_budget_is_spent_nearly_as_well_as_it_could_be(errors: list[list[float]], bits: float) -> None:
    costs = (2, 4, 8)
    errors = [sorted(e, reverse=True) for e in errors]
    chosen = allocate(errors, costs, bits * len(errors))
    assert sum(costs[c] for c in chosen) <= bits * len(errors) + 1e-6
    every = [
        sum(e[c] for e, c in zip(errors, way, strict=True))
        for way in itertools.product(range(3), repeat=len(errors))
        if sum(costs[c] for c in way) <= bits * len(errors) + 1e-9
    ]
    # What is lost against the best is at most the gain of one step of one thing.
    found = sum(e[c] for e, c in zip(errors, chosen, strict=True))
    assert found <= min(every) + max(e[0] - e[2] for e in errors) + 1e-9


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the smallest choice"):
        allocate([[1.0, 0.5]] * 3, (2, 4), 5)


@given(st.sampled_from([1, 2, 8, 64]))
def test_the_hadamard_transform_is_its_matrix_and_its_own_inverse(n: int) -> None:
    x = torch.randn(5, n, dtype=torch.float64)
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    torch.testing.assert_close(hadamard(x), x @ H / n**0.5)
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_a_transform_of_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(3, 12))


@pytest.mark.parametrize("datatype", ["int", "table"])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_fitted_ranges_beat_the_extremes(datatype: str, num_bits: int) -> None:
    x = torch.randn(2, 2, 200, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 16)
    weight = torch.ones(1, 2, 1, 16)
    fmt = KvFormat(num_bits, "channel", None, datatype)  # type: ignore[arg-type]
    static = fit_static(fmt, x, weight)
    assert static["scale"].shape == (2, 16)
    lo, hi = x.amin((0, 2)), x.amax((0, 2))
    plain = KvFormat(num_bits, "channel", None)
    extremes = {"scale": (hi - lo) / (2**num_bits - 1), "offset": lo}

    def error(fmt: KvFormat, static: dict[str, torch.Tensor]) -> float:
        return float((decode_kv(fmt, encode_kv(fmt, x, static), 16, static) - x).square().mean())

    assert error(fmt, static) < (0.8 if num_bits < 4 else 0.95) * error(plain, extremes)


@pytest.mark.parametrize("start", [0, 1])
def test_balancing_rotation_channels_are_a_rotation_and_cost_least_pair_by_pair(start: int) -> None:
    random = torch.Generator().manual_seed(3)
    roots = torch.randn(2, 3, 6, 6, generator=random, dtype=torch.float64)
    cost, spread = roots @ roots.mT
    first = torch.linalg.qr(torch.randn(3, 6, 6, generator=random, dtype=torch.float64)).Q if start else torch.eye(6)
    first = first.double().expand(3, 6, 6)

    def objective(R: torch.Tensor) -> torch.Tensor:
        a, b = ((R.mT @ m @ R).diagonal(dim1=1, dim2=2) for m in (cost, spread))
        return (a * b).sum(1)

    R = balancing_rotation(cost, spread, first)
    torch.testing.assert_close(R.mT @ R, torch.eye(6).double().expand(3, 6, 6))
    least = objective(R)
    assert (least < 0.99 * objective(first)).all()
    # No two channels turned by any angle come to less: the angle's formula against a search.
    for i, j in combinations(range(6), 2):
        for angle in torch.linspace(0, torch.pi, 181).tolist():
            turn = torch.eye(6, dtype=torch.float64)
            turn[i, i] = turn[j, j] = math.cos(angle)
            turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
            assert (objective(R @ turn) > least * (1 - 3e-3)).all()


def test_stretched_levels_rise_with_the_numbers_one_to_one() -> None:
    x = torch.randn(4, 1, 500, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    weight = torch.rand(4, 1, 500, 1, generator=torch.Generator().manual_seed(1))
    fmt = KvFormat(2, "channel", 500, "table")
    slopes = {}
    for correction in ("none", "q_norm", "slope"):
        static = fit_static(fmt, x, weight, correction=correction)  # type: ignore[arg-type]
        back = decode_kv(fmt, encode_kv(fmt, x, static), 8, static)
        w = (weight / weight.sum() / 8).expand_as(x)
        centred = x - (w * x).sum()
        slopes[correction] = float((w * centred * back).sum() / (w * centred.square()).sum())
    assert slopes["none"] < slopes["q_norm"] < 1
    assert slopes["q_norm"] < slopes["slope"] == pytest.approx(1, abs=0.06)


def test_q_norm_keeps_mean_and_deviation() -> None:
    x = torch.randn(4, 1, 500, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    fmt = KvFormat(2, "channel", None, "table")
    weight = torch.ones(1, 1, 1, 1)
    plain, normed = (fit_static(fmt, x, weight, correction=c) for c in ("none", "q_norm"))

    def back(static: dict[str, torch.Tensor]) -> torch.Tensor:
        return decode_kv(fmt, encode_kv(fmt, x, static), 8, static)

    assert abs(float(back(normed).std() - x.std())) < abs(float(back(plain).std() - x.std()))


def test_one_scale_for_all_is_the_largest_magnitude() -> None:
    x = torch.randn(2, 2, 9, 8)
    static = fit_static(KvFormat(8, "token", None, symmetric=True), x, torch.ones(1))
    torch.testing.assert_close(static["scale"], (x.abs().max() / 127).view(1, 1))


def test_nothing_is_fitted_where_nothing_is_left_open() -> None:
    assert fit_static(KvFormat(4, "token", 8), torch.randn(1, 1, 4, 8), torch.ones(1)) == {}
