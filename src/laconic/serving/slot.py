"""One token of one head as a run of bytes: codes of its key and value, their own ranges, and their outliers.

A slot needs nothing but what calibration fixed to be read, so pages of slots can be shared, moved, dropped and taken up
again in any order. Ranges that a run of `unit` tokens shares are packed beside their slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, Stored, encode_kv
from laconic.kv.scheme import HeadGroup, tokens_at_once


@dataclass(frozen=True)
class Field:
    """A tensor of what is stored, in the bytes [start, stop) of a token or of a unit, which has `rows` of it. of: keys
    or values."""

    of: str
    name: str
    start: int
    stop: int
    dtype: torch.dtype
    rows: int = 1


@dataclass(frozen=True)
class SlotLayout:
    """Where everything is in a slot of `nbytes`, and in the `shared_nbytes` of every `unit` tokens."""

    unit: int
    fields: tuple[Field, ...]
    nbytes: int
    shared: tuple[Field, ...]
    shared_nbytes: int

    def pack(self, keys: Stored, values: Stored) -> tuple[Tensor, Tensor]:
        """What `encode_kv` stored, (batch, heads, tokens, ...) each -> slots (batch, heads, tokens, nbytes) and what
        they share (batch, heads, tokens / unit, shared_nbytes), uint8."""
        stored = {"keys": keys, "values": values}
        lead = stored[self.fields[0].of][self.fields[0].name].shape[:3]
        device = next(iter(keys.values())).device
        slots = torch.zeros(*lead, self.nbytes, dtype=torch.uint8, device=device)
        shared = torch.zeros(*lead[:2], lead[2] // self.unit, self.shared_nbytes, dtype=torch.uint8, device=device)
        for f in self.fields:
            slots[..., f.start : f.stop] = stored[f.of][f.name].contiguous().view(torch.uint8)
        for f in self.shared:
            of_unit = stored[f.of][f.name].unflatten(2, (-1, f.rows)).flatten(3)
            shared[..., f.start : f.stop] = of_unit.contiguous().view(torch.uint8)
        return slots, shared

    def unpack(self, slots: Tensor, shared: Tensor) -> tuple[Stored, Stored]:
        """The inverse of `pack`, where either may have more bytes at its end."""
        stored: Mapping[str, Stored] = {"keys": {}, "values": {}}
        for f in self.fields:
            stored[f.of][f.name] = slots[..., f.start : f.stop].contiguous().view(f.dtype)
        for f in self.shared:
            of_unit = shared[..., f.start : f.stop].contiguous().view(f.dtype)
            stored[f.of][f.name] = of_unit.unflatten(3, (f.rows, -1)).flatten(2, 3)
        return stored["keys"], stored["values"]


def slot_layout(group: HeadGroup, channels: int, dtype: torch.dtype, unit: int | None = None) -> SlotLayout:
    """The slot of heads of so many channels. dtype: of what is stored in 16 bit. unit: of the layer, if it has heads
    stored otherwise.

    Raises: ValueError when heads of these channels cannot be stored so.
    """
    unit = unit or tokens_at_once([group])
    own: list[tuple[str, str, Tensor]] = []
    shared: list[tuple[str, str, Tensor]] = []
    for of, fmt in (("keys", group.keys), ("values", group.values)):
        fmt.check(channels)
        # One unit shows what is stored, under which names and dtypes.
        stored = encode_kv(fmt, torch.zeros(1, 1, unit, channels), _any_ranges(fmt), dtype)
        for name, t in stored.items():
            (own if t.shape[2] == unit else shared).append((of, name, t[0, 0]))
    slot, nbytes = _fields([(of, name, t[0]) for of, name, t in own])
    beside, shared_nbytes = _fields(shared)
    return SlotLayout(unit, slot, nbytes, beside, shared_nbytes)


def _any_ranges(fmt: KvFormat) -> dict[str, Tensor]:
    return {"scale": torch.ones(1, 1), "levels": torch.linspace(-1, 1, 2 ** min(fmt.num_bits, 8))}


def _fields(tensors: list[tuple[str, str, Tensor]]) -> tuple[tuple[Field, ...], int]:
    """One after another, the widest numbers first, so that each begins at a multiple of its size; and their bytes."""
    fields, start, widest = [], 0, 1
    for of, name, t in sorted(tensors, key=lambda w: -w[2].element_size()):
        fields.append(Field(of, name, start, start + t.nbytes, t.dtype, 1 if t.dim() == 1 else t.shape[0]))
        start, widest = start + t.nbytes, max(widest, t.element_size())
    return tuple(fields), -(-start // widest) * widest
