"""Rotations of a head's channels before they are rounded: Hadamard's, and one fitted to the errors of attention.

Axes: H heads, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from laconic.formats.rotation import hadamard

Rotations = tuple[Tensor, Tensor]
"""Rotations R of a layer's keys and of its values, (H or 1, C, C): x R is what is stored."""

# Jacobi sweeps over all pairs of channels; more make no measurable difference.
_SWEEPS = 12


def layer_rotations(kind: str | None, calibrated: Mapping[str, Tensor], channels: tuple[int, int]) -> Rotations | None:
    """Return the rotations of one layer.

    Args:
        kind: `rotation` of the cache's scheme.
        calibrated: Rotations from calibration, `keys` and `values`, where kind is `attention`.
        channels: Channels of a key and of a value.
    """
    if kind is None:
        return None
    if kind == "hadamard":
        return hadamard(torch.eye(channels[0]))[None], hadamard(torch.eye(channels[1]))[None]
    return calibrated["keys"], calibrated["values"]


def rotate(x: Tensor, rotation_HCC: Tensor) -> Tensor:
    """Compute x R for each head.

    Args:
        x: (batch, heads, [queries of a head,] tokens, channels).
        rotation_HCC: Rotation R of each head; (1, C, C) for one that all heads share.

    Returns:
        A new tensor of the shape of x.
    """
    rotated: Tensor = x @ (rotation_HCC if x.dim() == 4 else rotation_HCC[:, None])
    return rotated


def balancing_rotation(cost_HCC: Tensor, spread_HCC: Tensor, start_HCC: Tensor) -> Tensor:
    """Find a rotation R with a small sum over channels c of (R' cost R)_cc (R' spread R)_cc, by Jacobi sweeps.

    The first factor is the cost of an error in a channel, the second the square of the channel's spread and hence of
    the size of its error. Two channels i, j at a time are rotated against each other by their best angle: with
    a = (R' cost R)_ii, _jj, _ij and b likewise of spread, what the two add is a constant and
    r_a r_b cos(4 t - f_a - f_b), where r and f are length and angle of ((a_ii - a_jj) / 2, a_ij); it is least at
    4 t = f_a + f_b + pi.

    Args:
        cost_HCC: Symmetric, positive semidefinite.
        spread_HCC: Symmetric, positive semidefinite.
        start_HCC: Orthogonal; where the sweeps begin.

    Returns:
        (H, C, C), orthogonal, in the dtype of `start_HCC`.
    """
    R = start_HCC.double()
    A, B = (R.mT @ m.double() @ R for m in (cost_HCC, spread_HCC))
    n = A.shape[-1]
    for _ in range(_SWEEPS):
        for i, j in _tournament(n, A.device):
            fa, fb = (torch.atan2(m[:, i, j], (m[:, i, i] - m[:, j, j]) / 2) for m in (A, B))
            angle = (fa + fb + math.pi) / 4
            c, s = angle.cos()[:, None], angle.sin()[:, None]
            R = _rotate_pairs(R, i, j, c, s)
            A, B = (_rotate_pairs(_rotate_pairs(m, i, j, c, s).mT, i, j, c, s) for m in (A, B))
    return R.to(start_HCC.dtype)


def _rotate_pairs(m_HCC: Tensor, i: Tensor, j: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Rotate columns i against columns j, pair by pair, by angles with cosines c and sines s (H, 1, pairs)."""
    a, b = m_HCC[:, :, i], m_HCC[:, :, j]
    rotated = m_HCC.clone()
    rotated[:, :, i], rotated[:, :, j] = a * c + b * s, b * c - a * s
    return rotated


def _tournament(n: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return every pair of n channels once, n even, in rounds of pairs that share no channel."""
    order = list(range(n))
    rounds = []
    for _ in range(n - 1):
        half = n // 2
        rounds.append((torch.tensor(order[:half], device=device), torch.tensor(order[: half - 1 : -1], device=device)))
        order = [order[0], order[-1], *order[1:-1]]
    return rounds
