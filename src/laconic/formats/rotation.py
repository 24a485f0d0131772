"""A fast orthogonal transform of any number of channels: Hadamard's, together with Hartley's for odd factors.

n = m p, with p a power of two and m odd, takes the Kronecker product of an (m, m) Hartley matrix and a (p, p) Hadamard
matrix. Both are symmetric and orthogonal, so the transform is its own inverse, and its entries are at most sqrt(2 / n).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Largest size of the second factor of a rotation.
_FACTOR = 128


def hadamard(x: Tensor) -> Tensor:
    """Compute x H / sqrt(n) along the last dimension (Sylvester's order), in n log n operations.

    The transform is its own inverse.

    Args:
        x: (..., n), n a power of two.

    Returns:
        A new tensor of the shape of x.

    Raises:
        ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"a Hadamard transform needs a power of two numbers, not {n}")
    shape, half = x.shape, 1
    while half < n:
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(n)


@cache
def hartley(m: int) -> Tensor:
    """Return the matrix of the discrete Hartley transform, symmetric and orthogonal.

    Args:
        m: Its size.

    Returns:
        (m, m) float32, with entries (cos + sin)(2 pi j k / m) / sqrt(m).
    """
    k = torch.arange(m, dtype=torch.float64, device="cpu")
    angle = 2 * math.pi * (k[:, None] * k % m) / m
    return ((angle.cos() + angle.sin()) / math.sqrt(m)).float()


def rotate_channels(x: Tensor) -> Tensor:
    """Compute x Q along the last dimension, Q the transform of this module, in float32.

    The transform is its own inverse.

    Args:
        x: (..., n), any float dtype, any n.

    Returns:
        (..., n) float32.
    """
    n = x.shape[-1]
    m = n // (n & -n)
    parts = hadamard(x.float().reshape(*x.shape[:-1], m, n // m))
    if m > 1:
        parts = _hartley_on(m, x.device) @ parts
    return parts.reshape(x.shape)


@cache
def _hartley_on(m: int, device: torch.device) -> Tensor:
    """Return the matrix on a device: CUDA graphs cannot hold a copy from the host."""
    return hartley(m).to(device)


def rotation_factors(n: int) -> tuple[Tensor, Tensor]:
    """Return the rotation of n channels as a product of two small matrices (`rotate_by_factors`).

    Args:
        n: Number of channels.

    Returns:
        (n / b, n / b) and (b, b) float32, b the largest power of two up to 128 that divides n.
    """
    power = n & -n
    b = min(power, _FACTOR)
    sylvester = [hadamard(torch.eye(size, dtype=torch.float32, device="cpu")) for size in (power // b, b)]
    return torch.kron(hartley(n // power), sylvester[0]).contiguous(), sylvester[1]


def rotate_by_factors(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute `rotate_channels` in two matrix products.

    Args:
        x: (..., n), any float dtype.
        left: (n / b, n / b) float32.
        right: (b, b) float32.

    Returns:
        (..., n) in x's dtype.
    """
    parts = x.float().reshape(*x.shape[:-1], len(left), len(right))
    return (left @ (parts @ right)).reshape(x.shape).to(x.dtype)
