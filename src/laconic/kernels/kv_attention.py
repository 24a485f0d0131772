"""Attention of the newest tokens over a packed cache: keys and values are read as they are stored.

A query head h looks at key-value head h // (query heads / key-value heads). What it looks at, in this order: the
packed tokens, a row's first of them replaced by sinks where sinks are kept, and the recent window in 16 bit, of which
the new tokens are the last and see no later one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats.kv import KvFormat, Static, Stored, decode_kv
from laconic.formats.kv_scheme import KvScheme

Pair = tuple[Tensor, Tensor]
"""Keys and values in 16 bit, each (batch, key-value heads, tokens, channels)."""

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
) -> Tensor:
    """Attention of the newest tokens of each sequence over all that is cached of it.

    q: (batch, query heads, new tokens, channels). keys, values: of (batch, key-value heads, tokens, channels). window:
    the recent tokens, the new ones last. sinks: what replaces the first packed tokens that a row sees. scaling: of
    logits, channels^-1/2 if None. starts: (batch,), the first token that a row sees, counted from the first packed
    one; all if None.
    Returns: (batch, query heads, new tokens, channels), in q's dtype.
    """
    if q.is_cuda and fits(keys.fmt, q.shape[-1]) and fits(values.fmt, q.shape[-1]):
        from laconic.kernels.kv_attention_triton import kv_attention_triton

        return kv_attention_triton(q, keys, values, window, sinks, scaling, starts)
    return kv_attention_torch(q, keys, values, window, sinks, scaling, starts)


def kv_attention_torch(
    q: Tensor,
    keys: Packed,
    values: Packed,
    window: Pair,
    sinks: Pair | None = None,
    scaling: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """`kv_attention` in plain torch, float32: the reference."""
    batch, heads, new, channels = q.shape
    first = q.new_zeros(batch, dtype=torch.long) if starts is None else starts.long()
    k, v = (_all_of(p, w, s, first) for p, w, s in zip((keys, values), window, sinks or (None, None), strict=True))
    grouped = q.float().view(batch, k.shape[1], -1, channels)
    logits = grouped @ k.mT * (channels**-0.5 if scaling is None else scaling)
    slots = torch.arange(k.shape[2], device=q.device)
    latest = len(slots) - new + torch.arange(new, device=q.device)
    seen = (slots >= first[:, None, None]) & (slots <= latest[:, None])  # (batch, new tokens, tokens)
    logits = logits.unflatten(2, (-1, new)).masked_fill(~seen[:, None, None], -torch.inf).flatten(2, 3)
    return (logits.softmax(-1) @ v).view(batch, heads, new, channels).to(q.dtype)


def _all_of(packed: Packed, window: Tensor, sinks: Tensor | None, first: Tensor) -> Tensor:
    """(batch, key-value heads, tokens, channels) float32."""
    x = decode_kv(packed.fmt, packed.stored, window.shape[-1], packed.static).float()
    if sinks is not None:
        slots = first[:, None] + torch.arange(sinks.shape[2], device=x.device)
        rows, which = ((slots >= 0) & (slots < x.shape[2])).nonzero(as_tuple=True)
        x[rows, :, slots[rows, which]] = sinks[rows, :, which].float()
    return torch.cat([x, window.float()], 2)


def supports(scheme: KvScheme, channels: int) -> bool:
    """Whether the kernel reads every layer of a cache stored so, heads having this many channels: all but keys from
    before their rotary embedding, rotated heads, numbers stored apart, and ranges of very few numbers."""
    formats = {f for layer in scheme.layers for group in layer for f in (group.keys, group.values)}
    return not scheme.rotation and not scheme.pre_rope and all(fits(f, channels) for f in formats)


def fits(fmt: KvFormat, channels: int) -> bool:
    """Whether the kernel reads this format."""
    if fmt.num_bits not in _BITS or fmt.outlier_ratio or channels & (channels - 1):
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
