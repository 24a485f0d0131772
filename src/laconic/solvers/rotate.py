"""Rotations of a head's channels before they are rounded: Hadamard's, and one made for what attention does."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Turns = tuple[Tensor, Tensor]
"""Rotations of a layer's keys and of its values, (heads or 1, channels, channels): x R is what is stored."""

# Sweeps over all pairs of channels: later ones change nothing that one could measure.
_SWEEPS = 12


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(n) along the last dimension (Sylvester's order), in n log n operations and new memory. H is its own
    inverse. x: (..., n), n a power of two."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"a Hadamard transform wants a power of two numbers, not {n}")
    shape, half = x.shape, 1
    while half < n:
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(n)


def turns(kind: str | None, fixed: Mapping[str, Tensor], channels: tuple[int, int]) -> Turns | None:
    """A layer's rotations. kind: a scheme's `rotation`. fixed: `keys` and `values`, from calibration, where it is
    `attention`. channels: of keys and of values."""
    if kind is None:
        return None
    if kind == "hadamard":
        return hadamard(torch.eye(channels[0]))[None], hadamard(torch.eye(channels[1]))[None]
    return fixed["keys"], fixed["values"]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x R. x: (batch, heads, [queries a head,] tokens, channels)."""
    made: Tensor = x @ (turn if x.dim() == 4 else turn[:, None])
    return made


def balanced(cost: Tensor, spread: Tensor, start: Tensor) -> Tensor:
    """A rotation R of channels with a small sum over them of (R' cost R)_cc (R' spread R)_cc: what an error in a
    channel costs, times the square of how far numbers there are apart, hence how large an error is.

    Jacobi's sweeps: two channels are turned against each other by the angle that is best for them. With a = (R' cost
    R)_ii, _jj, _ij and b likewise, what the two add is a constant and r_a r_b cos(4 t - f_a - f_b), where r and f are
    length and angle of ((a_ii - a_jj) / 2, a_ij); it is least at 4 t = f_a + f_b + pi.

    cost, spread: (heads, n, n), symmetric, of no negative eigenvalue. start: (heads, n, n), where it begins.
    Returns: (heads, n, n), orthogonal, in start's dtype.
    """
    R = start.double()
    A, B = (R.mT @ m.double() @ R for m in (cost, spread))
    n = A.shape[-1]
    for _ in range(_SWEEPS):
        for i, j in _rounds(n, A.device):
            fa, fb = (torch.atan2(m[:, i, j], (m[:, i, i] - m[:, j, j]) / 2) for m in (A, B))
            angle = (fa + fb + math.pi) / 4
            c, s = angle.cos()[:, None], angle.sin()[:, None]
            R = _turned(R, i, j, c, s)
            A, B = (_turned(_turned(m, i, j, c, s).mT, i, j, c, s) for m in (A, B))
    return R.to(start.dtype)


def _turned(m: Tensor, i: Tensor, j: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Columns i and j of m (heads, n, n), pair by pair, turned by angles of these cosines and sines (heads, 1,
    pairs)."""
    a, b = m[:, :, i], m[:, :, j]
    out = m.clone()
    out[:, :, i], out[:, :, j] = a * c + b * s, b * c - a * s
    return out


def _rounds(n: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Every pair of n channels once, in rounds of pairs that share none (a tournament's). n: even."""
    order = list(range(n))
    rounds = []
    for _ in range(n - 1):
        half = n // 2
        rounds.append((torch.tensor(order[:half], device=device), torch.tensor(order[: half - 1 : -1], device=device)))
        order = [order[0], order[-1], *order[1:-1]]
    return rounds
