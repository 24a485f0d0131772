"""The Hadamard transform, which spreads an outlier over all channels and is its own inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(n) along the last dimension (Sylvester's order), in n log n operations and new memory. x: (..., n), n
    a power of two."""
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
