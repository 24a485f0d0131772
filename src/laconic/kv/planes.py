"""Codes of 1 to 8 bits in bytes, as bit planes: 3 bits are a plane of 2 bits and a plane of 1, each packed densely.

Along the last dimension of n codes a plane of p bits takes n p / 8 bytes; code c is in byte c mod (n p / 8), at bits
p (c div (n p / 8)). Neighbouring codes thus lie in neighbouring bytes, and a vector unit or a GPU unpacks a plane by
shifts alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planes(num_bits: int) -> list[tuple[int, int]]:
    """Return (width, lowest bit) of each plane: `num_bits` as a sum of 4, 2 and 1 (8 as two planes of 4).

    Args:
        num_bits: Bits of a code, 1 to 8.
    """
    widths_and_lows, low = [], 0
    while low < num_bits:
        width = next(p for p in (4, 2, 1) if p <= num_bits - low)
        widths_and_lows.append((width, low))
        low += width
    return widths_and_lows


def plane_widths(num_bits: int) -> list[int]:
    """Return the bits of each plane, as they lie in memory: codes of 8 bits are bytes, and not cut.

    Args:
        num_bits: Bits of a code, 1 to 8.
    """
    return [8] if num_bits == 8 else [width for width, _ in planes(num_bits)]


def field_size(n: int, num_bits: int) -> int:
    """Return the number of neighbouring codes that lie in one field of neighbouring bytes, in every plane.

    Args:
        n: Number of codes.
        num_bits: Bits of a code, 1 to 8.
    """
    return n * min(plane_widths(num_bits)) // 8


def packed_size(n: int, num_bits: int) -> int:
    """Return the number of bytes of n codes.

    Args:
        n: Number of codes.
        num_bits: Bits of a code, 1 to 8.

    Raises:
        ValueError: A plane does not fill whole bytes.
    """
    if num_bits < 8 and any(n * width % 8 for width, _ in planes(num_bits)):
        raise ValueError(f"{n} codes of {num_bits} bits do not fill whole bytes; n must be a multiple of 8")
    return n * num_bits // 8


def pack_planes(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: (..., n) of any integer dtype, in [0, 2^num_bits).
        num_bits: Bits of a code, 1 to 8.

    Returns:
        (..., n num_bits / 8) uint8.

    Raises:
        ValueError: A plane does not fill whole bytes.
    """
    codes = codes.to(torch.uint8)
    packed_size(codes.shape[-1], num_bits)
    if num_bits == 8:
        return codes
    packed = []
    for width, low in planes(num_bits):
        fields = ((codes >> low) & ((1 << width) - 1)).unflatten(-1, (8 // width, -1))
        plane = fields[..., 0, :].clone()
        for i in range(1, 8 // width):
            plane |= fields[..., i, :] << (i * width)
        packed.append(plane)
    return torch.cat(packed, -1) if len(packed) > 1 else packed[0]


def unpack_planes(packed: Tensor, num_bits: int, n: int) -> Tensor:
    """Invert `pack_planes`.

    Args:
        packed: (..., n num_bits / 8) uint8.
        num_bits: Bits of a code, 1 to 8.
        n: Number of codes.

    Returns:
        (..., n) uint8.
    """
    if num_bits == 8:
        return packed
    codes: Tensor | None = None
    sizes = [n * width // 8 for width, _ in planes(num_bits)]
    for (width, low), plane in zip(planes(num_bits), packed.split(sizes, -1), strict=True):
        mask = (1 << width) - 1
        fields = torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], -1)
        codes = fields << low if codes is None else codes | (fields << low)
    assert codes is not None
    return codes
