"""Orthogonal matrices of any size, applied without being formed: Hadamard's with random signs, or a random one.

Rotating channels spreads outliers over all of them (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456). A Hadamard
matrix does it best, since all its entries have one magnitude, but few sizes have one. n = m p, with p a power of two
and m odd, takes the Kronecker product of an (m, m) Hartley matrix and a (p, p) Hadamard matrix: its entries are at most
sqrt(2 / n), for every m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.formats.rotation import hadamard, hartley

RotationKind = Literal["hadamard", "random"]


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (M kron H_p) (I - 2 v v^T) of n = m p channels.

    Attributes:
        signs: (n,), each 1 or -1.
        odd: M, (m, m), orthogonal.
        reflection: The unit vector v, (n,); None for no reflection.
    """

    signs: Tensor
    odd: Tensor
    reflection: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Compute x Q in float32.

        Args:
            x: (..., n), of any floating dtype.

        Returns:
            (..., n) float32, on the device of x.
        """
        m, device = len(self.odd), x.device
        x = x.float() * self.signs.to(device)
        parts = hadamard(x.view(*x.shape[:-1], m, -1))
        if m > 1:
            parts = self.odd.to(device).T @ parts
        out = parts.reshape(x.shape)
        if self.reflection is None:
            return out
        v = self.reflection.to(device)
        return out - 2 * (out @ v)[..., None] * v


def make_rotation(n: int, kind: RotationKind, seed: int, *, keep_mean: bool = False) -> Rotation:
    """Make a random orthogonal matrix.

    Args:
        n: Number of channels.
        kind: `hadamard`: Hadamard's matrix (times a Hartley matrix) with random signs; `random`: uniformly distributed
            among all orthogonal matrices.
        seed: Of the random numbers.
        keep_mean: Whether a vector of ones is mapped to itself, so that vectors of zero mean keep that mean.

    Returns:
        The matrix, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        # With a positive diagonal of R the distribution is uniform (Mezzadri, arXiv math-ph/0609050).
        rotation = Rotation(torch.ones(n), (Q * R.diagonal().sign()).float())
    else:
        signs = torch.randint(2, (n,), generator=generator) * 2.0 - 1
        rotation = Rotation(signs, hartley(n // (n & -n)))
    if not keep_mean:
        return rotation
    u = torch.full((n,), 1 / math.sqrt(n))
    v = rotation.apply(u) - u
    return Rotation(rotation.signs, rotation.odd, v / v.norm())
