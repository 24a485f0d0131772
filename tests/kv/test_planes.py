"""Bit planes hold every code, in as few bytes as there are bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.kv.planes import pack_planes, packed_size, planes, unpack_planes


@given(num_bits=st.integers(1, 8), eighths=st.integers(1, 20), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_what_is_packed_comes_back(num_bits: int, eighths: int, rows: int, seed: int) -> None:
    n = 8 * eighths
    codes = torch.randint(0, 2**num_bits, (2, rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_planes(codes, num_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_size(n, num_bits)) == (2, rows, n * num_bits // 8)
    assert torch.equal(unpack_planes(packed, num_bits, n).long(), codes)


@pytest.mark.parametrize(
    ("num_bits", "expected"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [4]), (6, [4, 2]), (8, [4, 4])]
)
def test_bits_are_a_sum_of_planes(num_bits: int, expected: list[int]) -> None:
    assert [width for width, _ in planes(num_bits)] == expected


def test_where_a_code_lies() -> None:
    # 16 codes of 3 bits: a plane of 2 bits in 4 bytes, a plane of 1 bit in 2 bytes.
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[9] = 0b101
    packed = pack_planes(codes, 3)
    assert packed[9 % 4] == 0b01 << 2 * (9 // 4)
    assert packed[4 + 9 % 2] == 1 << (9 // 2)
    assert int((packed != 0).sum()) == 2


def test_codes_that_fill_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        pack_planes(torch.zeros(12, dtype=torch.uint8), 3)
