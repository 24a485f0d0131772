"""Rotations are orthogonal, flat, and keep the mean where that is asked."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.solvers.orthogonal import RotationKind, make_rotation

SIZES = [2, 12, 64, 72, 43 * 8, 101]


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_it_is_orthogonal(kind: RotationKind, keep_mean: bool) -> None:
    for n in SIZES:
        rotation = make_rotation(n, kind, seed=1, keep_mean=keep_mean)
        Q = rotation.apply(torch.eye(n))
        assert torch.allclose(Q @ Q.T, torch.eye(n), atol=1e-5)
        x = torch.randn(3, 5, n)
        assert torch.allclose(rotation.apply(x), x @ Q, atol=1e-4)
        if keep_mean:
            assert torch.allclose(rotation.apply(torch.ones(n)), torch.ones(n), atol=1e-4)


def test_hadamards_entries_are_small_for_every_size() -> None:
    for n in SIZES:
        assert make_rotation(n, "hadamard", seed=0).apply(torch.eye(n)).abs().max() <= math.sqrt(2 / n) + 1e-6
