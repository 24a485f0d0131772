"""Encoded keys and values of the groups of heads of one layer, and how they are cut and joined along time.

`encode_kv` returns tensors that all have the batch first and time in their third dimension, so they are cut and joined
here without a case for each format.

Axes: B sequences, H key-value heads, T encoded tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from laconic.kv.format import StaticParams, Stored, decode_kv, encode_kv
from laconic.kv.packed import KeysValues
from laconic.kv.scheme import HeadGroup

StoredPair = tuple[Stored, Stored]
"""Stored keys and values of a group of heads."""


def encode_groups(
    groups: Sequence[HeadGroup], keys: Tensor, values: Tensor, static: Mapping[str, StaticParams], dtype: torch.dtype
) -> list[StoredPair]:
    """Encode tokens, each group of heads in its own formats.

    Args:
        groups: Groups of heads of the layer.
        keys: (B, H, T, C), as they are to be stored.
        values: (B, H, T, C), likewise.
        static: Static parameters of `keys.G` and `values.G`, G the number of the group.
        dtype: Dtype of the model.

    Returns:
        Stored keys and values of each group.
    """
    pairs = []
    for g, group in enumerate(groups):
        k, v = (x if group.heads is None else x[:, list(group.heads)] for x in (keys, values))
        stored_keys = encode_kv(group.keys, k, static.get(f"keys.{g}"), dtype)
        pairs.append((stored_keys, encode_kv(group.values, v, static.get(f"values.{g}"), dtype)))
    return pairs


def decode_groups(
    groups: Sequence[HeadGroup],
    stored: Sequence[StoredPair],
    static: Mapping[str, StaticParams],
    channels: tuple[int, int],
) -> KeysValues:
    """Decode all tokens of all groups of heads.

    Args:
        groups: Groups of heads of the layer.
        stored: Stored keys and values of each group.
        static: Static parameters, as for `encode_groups`.
        channels: Channels of a key and of a value.

    Returns:
        Keys and values, each (B, H, T, C) float32, in the form in which they are stored.
    """
    keys, values = (_decode_side(groups, stored, static, side, channels[side]) for side in (0, 1))
    return keys, values


def _decode_side(
    groups: Sequence[HeadGroup],
    stored: Sequence[StoredPair],
    static: Mapping[str, StaticParams],
    side: int,
    channels: int,
) -> Tensor:
    """Decode the keys (`side` 0) or the values (1) of all heads."""
    name, parts = ("keys", "values")[side], list[Tensor]()
    for g, (group, pair) in enumerate(zip(groups, stored, strict=True)):
        fmt = (group.keys, group.values)[side]
        parts.append(decode_kv(fmt, pair[side], channels, static.get(f"{name}.{g}")))
    if len(parts) == 1 and groups[0].heads is None:
        return parts[0].float()
    heads = sum(part.shape[1] for part in parts)
    x_BHTC = parts[0].new_empty((parts[0].shape[0], heads, *parts[0].shape[2:]), dtype=torch.float32)
    for group, part in zip(groups, parts, strict=True):
        x_BHTC[:, list(group.heads or range(heads))] = part.float()
    return x_BHTC


def map_tensors(change: Callable[[Tensor], Tensor], pair: StoredPair) -> StoredPair:
    """Return stored keys and values with each tensor changed.

    Args:
        change: Returns the new tensor.
        pair: Stored keys and values of a group of heads.
    """
    keys, values = ({n: change(t) for n, t in stored.items()} for stored in pair)
    return keys, values


def cut_tokens(pair: StoredPair, tokens: int, start: int, stop: int) -> StoredPair:
    """Return a copy of the tokens [start, stop).

    Args:
        pair: Stored keys and values of a group of heads.
        tokens: Number of their tokens.
        start: First token, at the beginning of a unit of tokens that are encoded together.
        stop: End of the tokens, at the end of a unit.
    """

    def cut(t: Tensor) -> Tensor:
        per_entry = tokens // t.shape[2]
        return t[:, :, start // per_entry : stop // per_entry].clone()

    return map_tensors(cut, pair)


def join_tokens(old: StoredPair, new: StoredPair) -> StoredPair:
    """Join tokens along time.

    Args:
        old: Stored keys and values of a group of heads.
        new: Those of the tokens that follow.

    Returns:
        Stored keys and values of all tokens.
    """
    keys, values = ({n: torch.cat([a[n], b[n]], 2) for n in a} for a, b in zip(old, new, strict=True))
    return keys, values
