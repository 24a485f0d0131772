"""Codes of 1 to 8 bits in bytes, as planes: 3 bits are a plane of 2 and a plane of 1, each packed densely.

Along the last dimension of n codes a plane of p bits takes n p / 8 bytes; code c is in byte c mod (n p / 8), at bits
p (c div (n p / 8)). Neighbouring codes thus lie in neighbouring bytes, and a plane is unpacked by shifts alone, by a
vector unit or a GPU as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planes(num_bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit) of each plane: `num_bits` as a sum of 4, 2 and 1 (8 as two of 4)."""
    found, low = [], 0
    while low < num_bits:
        width = next(p for p in (4, 2, 1) if p <= num_bits - low)
        found.append((width, low))
        low += width
    return found


def packed_size(n: int, num_bits: int) -> int:
    """Bytes of n codes. Raises: ValueError when a plane does not fill whole bytes."""
    if num_bits < 8 and any(n * width % 8 for width, _ in planes(num_bits)):
        raise ValueError(f"{n} codes of {num_bits} bits do not fill whole bytes; n must be a multiple of 8")
    return n * num_bits // 8


def pack_planes(codes: Tensor, num_bits: int) -> Tensor:
    """codes: (..., n) of any integer dtype in [0, 2^bits) -> (..., n bits / 8) uint8."""
    codes = codes.to(torch.uint8)
    packed_size(codes.shape[-1], num_bits)
    if num_bits == 8:
        return codes
    made = []
    for width, low in planes(num_bits):
        fields = ((codes >> low) & ((1 << width) - 1)).unflatten(-1, (8 // width, -1))
        out = fields[..., 0, :].clone()
        for i in range(1, 8 // width):
            out |= fields[..., i, :] << (i * width)
        made.append(out)
    return torch.cat(made, -1) if len(made) > 1 else made[0]


def unpack_planes(packed: Tensor, num_bits: int, n: int) -> Tensor:
    """The inverse of `pack_planes`: (..., bytes) uint8 -> (..., n) uint8."""
    if num_bits == 8:
        return packed
    out: Tensor | None = None
    for (width, low), part in zip(
        planes(num_bits), packed.split([n * w // 8 for w, _ in planes(num_bits)], -1), strict=True
    ):
        mask = (1 << width) - 1
        fields = torch.cat([(part >> shift) & mask for shift in range(0, 8, width)], -1)
        out = fields << low if out is None else out | (fields << low)
    assert out is not None
    return out
