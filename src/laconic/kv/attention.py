"""Attention of the newest tokens over a packed cache: keys and values are read as they are stored.

A query head h looks at key-value head h // (query heads / key-value heads). What it looks at, in this order: the
packed tokens, a row's first of them replaced by sinks where sinks are kept, and the recent window in 16 bit, of which
the new tokens are the last and see no later one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, Static, Stored, decode_kv
from laconic.kv.scheme import HeadGroup, KvScheme

Pair = tuple[Tensor, Tensor]
"""Keys and values in 16 bit, each (batch, key-value heads, tokens, channels)."""

# Queries that share a key-value head, at most: more do not fit into a program's registers.
MOST_QUERIES = 32

# Numbers of a token that are stored apart, at most: each is put in its place by products of its own.
_MOST_APART = 4
Angles = tuple[Tensor, Tensor]
"""Cosines and sines by which packed keys are turned, the first half of the channels against the second: (batch or 1,
packed tokens, channels / 2), float16."""

_BITS = (1, 2, 3, 4, 8)
# The fewest numbers a side of a tensor core's product has: fewer codes with one range would leave it half empty.
_SIDE = 16


@dataclass(frozen=True)
class Packed:
    """Keys, or values, as `encode_kv` stores them. static: what calibration fixed of them."""

    fmt: KvFormat
    stored: Stored
    static: Static | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self.stored["codes"].shape[2]


def kv_attention(
    q: Tensor,
    keys: Packed,
    values: Packed,
    window: Pair,
    sinks: Pair | None = None,
    scaling: float | None = None,
    starts: Tensor | None = None,
    angles: Angles | None = None,
) -> Tensor:
    """Attention of the newest tokens of each sequence over all that is cached of it.

    q: (batch, query heads, new tokens, channels). keys, values: of (batch, key-value heads, tokens, channels). window:
    the recent tokens, the new ones last. sinks: what replaces the first packed tokens that a row sees. scaling: of
    logits, channels^-1/2 if None. starts: (batch,), the first token that a row sees, counted from the first packed
    one; all if None. angles: of the packed tokens, where keys are stored before their rotary embedding.
    Returns: (batch, query heads, new tokens, channels), in q's dtype.
    """
    if runs_on(q.device) and fits(keys.fmt, q.shape[-1]) and fits(values.fmt, q.shape[-1]):
        from laconic.kv.attention_triton import kv_attention_triton

        return kv_attention_triton(q, keys, values, window, sinks, scaling, starts, angles)
    return kv_attention_torch(q, keys, values, window, sinks, scaling, starts, angles)


def kv_attention_torch(
    q: Tensor,
    keys: Packed,
    values: Packed,
    window: Pair,
    sinks: Pair | None = None,
    scaling: float | None = None,
    starts: Tensor | None = None,
    angles: Angles | None = None,
) -> Tensor:
    """`kv_attention` in plain torch, float32: the reference."""
    batch, heads, new, channels = q.shape
    first = q.new_zeros(batch, dtype=torch.long) if starts is None else starts.long()
    k = _all_of(keys, window[0], sinks and sinks[0], first, angles)
    v = _all_of(values, window[1], sinks and sinks[1], first)
    grouped = q.float().reshape(batch, k.shape[1], -1, channels)
    logits = grouped @ k.mT * (channels**-0.5 if scaling is None else scaling)
    slots = torch.arange(k.shape[2], device=q.device)
    latest = len(slots) - new + torch.arange(new, device=q.device)
    seen = (slots >= first[:, None, None]) & (slots <= latest[:, None])  # (batch, new tokens, tokens)
    logits = logits.unflatten(2, (-1, new)).masked_fill(~seen[:, None, None], -torch.inf).flatten(2, 3)
    made: Tensor = logits.softmax(-1) @ v
    return made.view(batch, heads, new, channels).to(q.dtype)


def _all_of(
    packed: Packed, window: Tensor, sinks: Tensor | None, first: Tensor, angles: Angles | None = None
) -> Tensor:
    """(batch, key-value heads, tokens, channels) float32."""
    x = decode_kv(packed.fmt, packed.stored, window.shape[-1], packed.static).float()
    if angles is not None:
        cos, sin = (a.float()[:, None] for a in angles)
        a, b = x.chunk(2, -1)
        x = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    if sinks is not None:
        slots = first[:, None] + torch.arange(sinks.shape[2], device=x.device)
        rows, which = ((slots >= 0) & (slots < x.shape[2])).nonzero(as_tuple=True)
        x[rows, :, slots[rows, which]] = sinks[rows, :, which].float()
    return torch.cat([x, window.float()], 2)


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on tensors there: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1) anywhere."""
    return find_spec("triton") is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def supports(scheme: KvScheme, channels: int) -> bool:
    """Whether every layer of a cache stored so is read as it is, heads having this many channels."""
    return all(supports_layer(scheme, layer, channels) for layer in scheme.layers)


def supports_layer(scheme: KvScheme, layer: Sequence[HeadGroup], channels: int) -> bool:
    """Whether a layer is: all but numbers in 16 bit, many numbers stored apart, ranges of very few numbers, and keys
    that were rotated before their rotary embedding. (Else rotated heads are, by rotated queries.)"""
    formats = {f for group in layer for f in (group.keys, group.values)}
    if scheme.pre_rope and (scheme.rotation or channels < 2 * _SIDE):
        return False
    return all(fits(f, channels) for f in formats)


def fits(fmt: KvFormat, channels: int) -> bool:
    """Whether the kernel reads this format."""
    if fmt.num_bits not in _BITS or fmt.outliers(channels) > _MOST_APART or channels & (channels - 1):
        return False
    if fmt.group_size is None or fmt.axis == "channel":
        return segment(fmt, channels) >= _SIDE and (fmt.group_size or _SIDE) % _SIDE == 0
    return segment(fmt, channels) >= _SIDE and not fmt.group_size & (fmt.group_size - 1)


def segment(fmt: KvFormat, channels: int) -> int:
    """How many neighbouring channels lie in one field of neighbouring bytes, in every plane, and share their range
    where it is a token's."""
    narrowest = 8 if fmt.num_bits == 8 else fmt.num_bits & -fmt.num_bits
    shared = fmt.group_size if fmt.axis == "token" and fmt.group_size else channels
    return min(channels * narrowest // 8, shared)
