"""Parts of a quantized cache that attention reads, and the formats that the kernel reads as they are stored.

Axes: B sequences, H key-value heads, T packed tokens, W tokens of the recent window, S sinks, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, StaticParams, Stored
from laconic.kv.planes import field_size
from laconic.kv.positions import RotaryAngles
from laconic.kv.scheme import HeadGroup, KvScheme
from laconic.solvers.rotate import Rotations

KeysValues = tuple[Tensor, Tensor]
"""Keys and values in 16 bit, each (B, H, tokens, C)."""

# Queries (new tokens times query heads) that share a key-value head; more do not fit into a program's registers.
MAX_QUERIES = 32

# Outliers of a token: each takes loads and a product of its own in the kernel.
_MAX_OUTLIERS = 4
_KERNEL_BITS = (1, 2, 3, 4, 8)
# Smallest side of a tensor core's product; fewer codes that share a range would leave it half empty.
_MIN_SIDE = 16


@dataclass(frozen=True)
class PackedTokens:
    """Keys, or values, as `encode_kv` stores them.

    Attributes:
        fmt: Their format.
        stored: Result of `encode_kv`.
        static: Static parameters, where the format has any.
    """

    fmt: KvFormat
    stored: Stored
    static: StaticParams | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stored["codes"].shape[2]


@dataclass(frozen=True)
class PackedHistory:
    """All tokens that the newest ones attend to, in this order: packed tokens, then the recent window.

    Attributes:
        keys: Packed keys, of (B, H, T, C).
        values: Packed values, of (B, H, T, C).
        window: Recent tokens in 16 bit, the new ones last, (B, H, W, C).
        sinks: Tokens in 16 bit in place of the first packed ones that each row attends to, (B, H, S, C); None for none.
        first_B: Column of the first token that each row attends to, counted from the first packed one; None where all
            rows attend to all tokens.
        angles: Rotary angles of the packed tokens, where keys are stored before their rotary embedding.
    """

    keys: PackedTokens
    values: PackedTokens
    window: KeysValues
    sinks: KeysValues | None = None
    first_B: Tensor | None = None
    angles: RotaryAngles | None = None


@dataclass(frozen=True)
class PackedGroup:
    """Packed keys and values of a group of a layer's heads.

    Attributes:
        heads: Key-value heads of the group; None for all of the layer.
        keys: Their packed keys.
        values: Their packed values.
    """

    heads: tuple[int, ...] | None
    keys: PackedTokens
    values: PackedTokens


@dataclass(frozen=True)
class LayerHistory:
    """One layer's cache as one forward pass attends to it; later passes leave it unchanged.

    Attributes:
        heads: Number of key-value heads of the layer.
        new: Number of new tokens of the pass.
        groups: Packed tokens of each group of heads, rotated where there are `rotations`.
        window: Recent tokens of all heads in 16 bit, not rotated.
        sinks: First tokens of all heads in 16 bit, not rotated.
        first_B: Column of the first token that each row attends to; see `PackedHistory`.
        angles: Rotary angles of the packed tokens; see `PackedHistory`.
        rotations: Rotations of keys and values.
        sliding: Whether the layer has a sliding window.
        only_padding: Whether the mask hides padding and nothing else.
    """

    heads: int
    new: int
    groups: tuple[PackedGroup, ...]
    window: KeysValues
    sinks: KeysValues | None
    first_B: Tensor | None
    angles: RotaryAngles | None
    rotations: Rotations | None
    sliding: bool
    only_padding: bool


@lru_cache
def kernel_runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernel runs on a device: a GPU, or any by Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        device: The device.
    """
    return find_spec("triton") is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def kernel_reads_scheme(scheme: KvScheme, channels: int) -> bool:
    """Return whether the kernel reads every layer of a cache.

    Args:
        scheme: Scheme of the cache.
        channels: Channels of a head.
    """
    return all(kernel_reads_layer(scheme, layer, channels) for layer in scheme.layers)


def kernel_reads_layer(scheme: KvScheme, layer: Sequence[HeadGroup], channels: int) -> bool:
    """Return whether the kernel reads a layer of a scheme.

    Keys that were rotated (`rotation`) before their rotary embedding cannot be read: elsewhere queries are rotated
    instead of keys, but here the embedding comes between.

    Args:
        scheme: Scheme of the cache.
        layer: Groups of heads of the layer.
        channels: Channels of a head.
    """
    if scheme.pre_rope and (scheme.rotation or channels < 2 * _MIN_SIDE):
        return False
    return all(kernel_reads(f, channels) for f in {f for group in layer for f in (group.keys, group.values)})


def kernel_reads(fmt: KvFormat, channels: int) -> bool:
    """Return whether the kernel reads a format.

    Args:
        fmt: The format.
        channels: Channels of a head.
    """
    if fmt.num_bits not in _KERNEL_BITS or fmt.outliers(channels) > _MAX_OUTLIERS or channels & (channels - 1):
        return False
    if segment(fmt, channels) < _MIN_SIDE:
        return False
    if fmt.group_size is None or fmt.axis == "channel":
        return (fmt.group_size or _MIN_SIDE) % _MIN_SIDE == 0
    return not fmt.group_size & (fmt.group_size - 1)


def segment(fmt: KvFormat, channels: int) -> int:
    """Return the size of a segment: neighbouring channels in one field of neighbouring bytes, in every bit plane.

    Where ranges are of tokens, the channels of a segment also share one.

    Args:
        fmt: The format.
        channels: Channels of a head.
    """
    shared = fmt.group_size if fmt.axis == "token" and fmt.group_size else channels
    return min(field_size(channels, fmt.num_bits), shared)
