"""A slot: one token of one head in a page, as bytes: codes of its key and value, their ranges and their outliers.

A slot is decoded with nothing but itself and the static parameters of calibration, so pages of slots can be shared,
moved, dropped and reused in any order. Ranges that a unit of tokens shares are packed beside the slots.

Axes: B sequences, H key-value heads, T tokens, U units of tokens, X bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, Stored, encode_kv
from laconic.kv.scheme import HeadGroup, tokens_at_once


@dataclass(frozen=True)
class SlotField:
    """Position of a stored tensor in the bytes of a slot, or in those that a unit shares.

    Attributes:
        side: `keys` or `values`.
        name: Name of the tensor, as `encode_kv` returns it.
        start: Its first byte.
        stop: The byte after its last.
        dtype: Its dtype.
        rows: Its rows for a unit; 1 in a slot.
    """

    side: str
    name: str
    start: int
    stop: int
    dtype: torch.dtype
    rows: int = 1


@dataclass(frozen=True)
class SlotLayout:
    """Positions of all stored tensors in a slot, and in the bytes that a unit of tokens shares.

    Attributes:
        unit: Tokens of a unit.
        fields: Fields of a slot.
        nbytes: Bytes of a slot.
        shared: Fields of what a unit shares.
        shared_nbytes: Bytes of what a unit shares.
    """

    unit: int
    fields: tuple[SlotField, ...]
    nbytes: int
    shared: tuple[SlotField, ...]
    shared_nbytes: int

    def pack(self, keys: Stored, values: Stored) -> tuple[Tensor, Tensor]:
        """Pack stored tensors into bytes.

        Args:
            keys: Result of `encode_kv` for keys, (B, H, T, ...) each.
            values: Result of `encode_kv` for values, likewise.

        Returns:
            Slots (B, H, T, `nbytes`) and bytes that units share (B, H, U, `shared_nbytes`), uint8.
        """
        stored = {"keys": keys, "values": values}
        lead = stored[self.fields[0].side][self.fields[0].name].shape[:3]
        device = next(iter(keys.values())).device
        slots_BHTX = torch.zeros(*lead, self.nbytes, dtype=torch.uint8, device=device)
        shared_BHUX = torch.zeros(*lead[:2], lead[2] // self.unit, self.shared_nbytes, dtype=torch.uint8, device=device)
        for f in self.fields:
            slots_BHTX[..., f.start : f.stop] = stored[f.side][f.name].contiguous().view(torch.uint8)
        for f in self.shared:
            of_unit = stored[f.side][f.name].unflatten(2, (-1, f.rows)).flatten(3)
            shared_BHUX[..., f.start : f.stop] = of_unit.contiguous().view(torch.uint8)
        return slots_BHTX, shared_BHUX

    def unpack(self, slots_BHTX: Tensor, shared_BHUX: Tensor) -> tuple[Stored, Stored]:
        """Invert `pack`.

        Args:
            slots_BHTX: (B, H, T, at least `nbytes`) uint8 slots; bytes behind the fields are ignored.
            shared_BHUX: (B, H, U, at least `shared_nbytes`) uint8 bytes that units share; likewise.

        Returns:
            Stored tensors of keys and of values, as `encode_kv` returns them.
        """
        stored: Mapping[str, Stored] = {"keys": {}, "values": {}}
        for f in self.fields:
            stored[f.side][f.name] = slots_BHTX[..., f.start : f.stop].contiguous().view(f.dtype)
        for f in self.shared:
            of_unit = shared_BHUX[..., f.start : f.stop].contiguous().view(f.dtype)
            stored[f.side][f.name] = of_unit.unflatten(3, (f.rows, -1)).flatten(2, 3)
        return stored["keys"], stored["values"]


def slot_layout(group: HeadGroup, channels: int, dtype: torch.dtype, unit: int | None = None) -> SlotLayout:
    """Lay out the slots of a group of heads.

    Args:
        group: Formats of its keys and values.
        channels: Channels of a head.
        dtype: Dtype of what is stored in 16 bit.
        unit: Tokens of a unit of the layer, where other groups of its heads need larger units.

    Returns:
        The layout.

    Raises:
        ValueError: Heads of so many channels cannot be stored in these formats.
    """
    unit = unit or tokens_at_once([group])
    of_slot: list[tuple[str, str, Tensor]] = []
    of_unit: list[tuple[str, str, Tensor]] = []
    for side, fmt in (("keys", group.keys), ("values", group.values)):
        fmt.check(channels)
        # Encode one unit, to see the names, shapes and dtypes of what is stored.
        stored = encode_kv(fmt, torch.zeros(1, 1, unit, channels), _placeholder_static(fmt), dtype)
        for name, t in stored.items():
            (of_slot if t.shape[2] == unit else of_unit).append((side, name, t[0, 0]))
    fields, nbytes = _fields([(side, name, t[0]) for side, name, t in of_slot])
    shared, shared_nbytes = _fields(of_unit)
    return SlotLayout(unit, fields, nbytes, shared, shared_nbytes)


def from_arrays(fields: Sequence[SlotField], arrays: Tensor, count: int) -> Tensor:
    """Return slots, or what units share, of which each field is an array over all of them.

    Args:
        fields: Fields of a slot, or of what a unit shares.
        arrays: (..., at least all bytes) uint8 arrays, one after another.
        count: Number of slots or of units.

    Returns:
        (..., count, bytes of all fields) uint8.
    """
    if not fields:
        return arrays.new_empty(*arrays.shape[:-1], count, 0)
    of_fields = [arrays[..., count * f.start : count * f.stop].unflatten(-1, (count, f.stop - f.start)) for f in fields]
    return torch.cat(of_fields, -1)


def array_bytes(fields: Sequence[SlotField], nbytes: int, numbers: Tensor, count: int) -> Tensor:
    """Return where the bytes of slots, or of what units share, lie in the arrays of `from_arrays`.

    Args:
        fields: Fields of a slot, or of what a unit shares.
        nbytes: Bytes of a slot or unit, at least those of the fields; further ones lie behind the arrays.
        numbers: (n,) numbers of the slots or units.
        count: Number of slots or units in the arrays.

    Returns:
        (n, nbytes) int64.
    """
    begin_X, step_X = _byte_steps(tuple(fields), nbytes, count, numbers.device)
    return begin_X + numbers.long()[:, None] * step_X


@lru_cache(maxsize=64)
def _byte_steps(fields: tuple[SlotField, ...], nbytes: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each byte of the first slot lies, and how far from it that of the next slot."""
    end = fields[-1].stop if fields else 0
    begin_X = [count * f.start + x for f in fields for x in range(f.stop - f.start)]
    begin_X += range(count * end, count * end + nbytes - end)
    step_X = [f.stop - f.start for f in fields for _ in range(f.stop - f.start)] + [nbytes - end] * (nbytes - end)
    return torch.tensor(begin_X, device=device).long(), torch.tensor(step_X, device=device).long()


def _placeholder_static(fmt: KvFormat) -> dict[str, Tensor]:
    return {"scale": torch.ones(1, 1), "levels": torch.linspace(-1, 1, 2 ** min(fmt.num_bits, 8))}


def _fields(tensors: list[tuple[str, str, Tensor]]) -> tuple[tuple[SlotField, ...], int]:
    """Lay tensors out one after another, and return their bytes too.

    The widest numbers come first, so that each field begins at a multiple of its item size.
    """
    fields, start, widest = [], 0, 1
    for side, name, t in sorted(tensors, key=lambda entry: -entry[2].element_size()):
        fields.append(SlotField(side, name, start, start + t.nbytes, t.dtype, 1 if t.dim() == 1 else t.shape[0]))
        start, widest = start + t.nbytes, max(widest, t.element_size())
    return tuple(fields), -(-start // widest) * widest
