"""One token of one head as a run of bytes: codes of its key and value, their own ranges, and their outliers.

A slot needs nothing but what calibration fixed to be read, so pages of slots can be shared, moved, dropped and taken up
again in any order. It cannot hold a range that several tokens share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats.kv import KvFormat, Stored, encode_kv


@dataclass(frozen=True)
class Field:
    """A tensor of what is stored: `width` numbers of a dtype in the bytes [start, stop). of: keys or values."""

    of: str
    name: str
    start: int
    stop: int
    dtype: torch.dtype


@dataclass(frozen=True)
class SlotLayout:
    """Where everything is in a slot of so many bytes. Each field begins at a multiple of its dtype's size."""

    fields: tuple[Field, ...]
    nbytes: int

    def pack(self, keys: Stored, values: Stored) -> Tensor:
        """What `encode_kv` stored, (batch, heads, tokens, ...) each -> (batch, heads, tokens, nbytes) uint8."""
        stored = {"keys": keys, "values": values}
        first = next(iter(keys.values()))
        slots = torch.zeros(*first.shape[:3], self.nbytes, dtype=torch.uint8, device=first.device)
        for f in self.fields:
            slots[..., f.start : f.stop] = stored[f.of][f.name].contiguous().view(torch.uint8)
        return slots

    def unpack(self, slots: Tensor) -> tuple[Stored, Stored]:
        """The inverse of `pack`, of slots that may have more bytes at their end."""
        stored: Mapping[str, Stored] = {"keys": {}, "values": {}}
        for f in self.fields:
            stored[f.of][f.name] = slots[..., f.start : f.stop].contiguous().view(f.dtype)
        return stored["keys"], stored["values"]


def slot_layout(keys: KvFormat, values: KvFormat, channels: int, dtype: torch.dtype) -> SlotLayout:
    """The slot of a head of so many channels. dtype: of what is stored in 16 bit.

    Raises: ValueError when tokens share ranges, or heads of these channels cannot be stored so.
    """
    wanted: list[tuple[str, str, Tensor]] = []
    for of, fmt in (("keys", keys), ("values", values)):
        fmt.check(channels)
        if fmt.tokens_at_once > 1:
            raise ValueError(
                f"{of} are stored in ranges of {fmt.tokens_at_once} tokens, and a slot holds one token; use "
                "axis: token, or ranges that calibration fixes (group_size: null)"
            )
        # One token shows what is stored, under which names and dtypes.
        fixed = {"scale": torch.ones(1, 1), "levels": torch.linspace(-1, 1, 2 ** min(fmt.num_bits, 8))}
        stored = encode_kv(fmt, torch.zeros(1, 1, 1, channels), fixed, dtype)
        wanted += [(of, name, t) for name, t in stored.items()]
    wanted.sort(key=lambda w: -w[2].element_size())
    fields, start = [], 0
    for of, name, t in wanted:
        fields.append(Field(of, name, start, start + t.nbytes, t.dtype))
        start += t.nbytes
    widest = wanted[0][2].element_size()
    return SlotLayout(tuple(fields), -(-start // widest) * widest)
