"""Rotations drawn at random, as calibration might have chosen them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_rotations(heads: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of keys and of values, (heads, channels, channels), orthogonal."""
    drawn = torch.randn(2, heads, channels, channels, generator=torch.Generator().manual_seed(seed))
    keys, values = torch.linalg.qr(drawn).Q
    return keys, values


def static_rotations(layers: int, heads: int, channels: int) -> list[dict[str, dict[str, Tensor]]]:
    """The same for every layer, as static parameters of a cache."""
    pairs = (random_rotations(heads, channels, i) for i in range(layers))
    return [{"turn.0": {"keys": keys, "values": values}} for keys, values in pairs]
