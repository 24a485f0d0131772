"""Codes of 2 to 8 bits in int32 words, densely: the layout compressed-tensors calls `pack-quantized`.

A row of n codes fills ceil(n * bits / 32) words, code i at bits [i * bits, (i + 1) * bits) counted from the lowest
bit of the first word; where 32 is no multiple of `bits` a code may span two words. Codes are stored with
2^(bits-1) added, so that the field is unsigned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack the codes of each row densely.

    Args:
        codes: (rows, n) int8, in [-2^(bits-1), 2^(bits-1) - 1].
        num_bits: Bits of a code, 2 to 8.

    Returns:
        (rows, ceil(n * bits / 32)) int32.
    """
    n = codes.shape[-1]
    period, words = _period(num_bits)
    unsigned = codes.to(torch.int64) + 2 ** (num_bits - 1)
    fields = pad(unsigned, (0, -n % period)).unflatten(-1, (-1, period))
    out = torch.zeros(*fields.shape[:-1], words, dtype=torch.int64, device=codes.device)
    for i in range(period):
        word, offset = divmod(i * num_bits, 32)
        shifted = fields[..., i] << offset
        out[..., word] |= shifted & 0xFFFFFFFF
        if offset + num_bits > 32:
            out[..., word + 1] |= shifted >> 32
    # int64 words in [0, 2^32) wrap to the int32 that has the same 32 bits.
    return out.flatten(-2)[..., : _words(n, num_bits)].to(torch.int32).contiguous()


def unpack(packed: Tensor, num_bits: int, n: int) -> Tensor:
    """Unpack codes: the inverse of `pack`.

    Args:
        packed: (rows, words) int32.
        num_bits: Bits of a code, 2 to 8.
        n: Number of codes of a row.

    Returns:
        (rows, n) int8.

    Raises:
        ValueError: A row of n codes does not take so many words.
    """
    if packed.shape[-1] != _words(n, num_bits):
        raise ValueError(f"{packed.shape[-1]} words do not hold {n} codes of {num_bits} bits")
    period, words = _period(num_bits)
    groups = math.ceil(n / period)
    unsigned = packed.to(torch.int64) & 0xFFFFFFFF
    unsigned = pad(unsigned, (0, groups * words - unsigned.shape[-1])).unflatten(-1, (groups, words))
    out = torch.empty(*unsigned.shape[:-1], period, dtype=torch.int64, device=packed.device)
    for i in range(period):
        word, offset = divmod(i * num_bits, 32)
        field = unsigned[..., word] >> offset
        if offset + num_bits > 32:
            field = field | (unsigned[..., word + 1] << (32 - offset))
        out[..., i] = field & (2**num_bits - 1)
    signed = out.flatten(-2)[..., :n] - (1 << (num_bits - 1))
    return signed.to(torch.int8).contiguous()


def _period(num_bits: int) -> tuple[int, int]:
    """Return the codes and the words of the shortest run of codes that fills whole words."""
    bits = math.lcm(num_bits, 32)
    return bits // num_bits, bits // 32


def _words(n: int, num_bits: int) -> int:
    return math.ceil(n * num_bits / 32)
