"""Zeros are put where they belong, and the pattern that they have is found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.bench.zeros import is_2_of_4, to_2_of_4, to_unstructured, to_zero_blocks, zeros_of


def random(rows: int = 64, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_of_every_four_the_two_largest_stay(rows: int, fours: int, seed: int) -> None:
    W = random(rows, 4 * fours, seed)
    pruned = to_2_of_4(W)
    for row, kept in zip(W.view(-1, 4).tolist(), pruned.view(-1, 4).tolist(), strict=True):
        largest = sorted(row, key=abs)[2:]
        assert kept == [w if w in largest else 0 for w in row]
    assert is_2_of_4(pruned)


@given(st.floats(0, 1), st.integers(0, 99))
def test_the_smallest_share_is_zero(sparsity: float, seed: int) -> None:
    W = random(8, 16, seed)
    pruned = to_unstructured(W, sparsity)
    count = round(sparsity * 128)
    assert int((pruned == 0).sum()) == count
    assert set(pruned[pruned != 0].tolist()) == set(sorted(W.flatten().tolist(), key=abs)[count:])


def test_blocks_of_the_smallest_norm_are_zero() -> None:
    W = random()
    pruned = to_zero_blocks(W, 16, 0.25)
    norms = {(i, j): float(W[i : i + 16, j : j + 16].norm()) for i in range(0, 64, 16) for j in range(0, 128, 16)}
    smallest = sorted(norms, key=lambda at: norms[at])[:8]
    for i, j in norms:
        block = pruned[i : i + 16, j : j + 16]
        assert torch.equal(block, torch.zeros_like(block) if (i, j) in smallest else W[i : i + 16, j : j + 16])


@pytest.mark.parametrize(
    ("W", "pattern", "share"),
    [
        (random(), "none", 0.0),
        (to_unstructured(random(), 0.5), "unstructured", 0.5),
        (to_2_of_4(random()), "2:4", 0.5),
        (to_zero_blocks(random(), 16, 0.5), "block 16", 0.5),
        (to_zero_blocks(random(), 64, 0.5), "block 64", 0.5),
        (random(6, 10), "none", 0.0),
    ],
    ids=["dense", "unstructured", "2:4", "block 16", "block 64", "odd"],
)
def test_the_most_regular_pattern_is_found(W: torch.Tensor, pattern: str, share: float) -> None:
    found = zeros_of(W)
    assert (found.pattern, found.share) == (pattern, share)
