"""Packing: codes of any width in 32-bit words, bit for bit as compressed-tensors lays them out."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laconic.formats.packing import pack, unpack

widths = pytest.mark.parametrize("num_bits", range(2, 9))


@st.composite
def rows_of_codes(draw: st.DrawFn, num_bits: int) -> Tensor:
    half = 2 ** (num_bits - 1)
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    row = st.lists(st.integers(-half, half - 1), min_size=n, max_size=n)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.int8)


@widths
@given(data=st.data())
def test_unpacking_gives_back_what_was_packed(num_bits: int, data: st.DataObject) -> None:
    codes = data.draw(rows_of_codes(num_bits))
    assert torch.equal(unpack(pack(codes, num_bits), num_bits, codes.shape[1]), codes)


@widths
@given(data=st.data())
def test_packed_words_are_those_of_compressed_tensors(num_bits: int, data: st.DataObject) -> None:
    codes = data.draw(rows_of_codes(num_bits))
    packed = pack(codes, num_bits)
    assert torch.equal(packed, pack_to_int32(codes, num_bits))
    assert torch.equal(unpack_from_int32(packed, num_bits, codes.shape), codes)


@widths
def test_a_row_is_one_long_integer_cut_into_words(num_bits: int) -> None:
    codes = torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), (1, 45), dtype=torch.int8)
    integer = sum((code + 2 ** (num_bits - 1)) << (i * num_bits) for i, code in enumerate(codes[0].tolist()))
    words = integer.to_bytes(4 * math.ceil(45 * num_bits / 32), "little")
    assert bytes(pack(codes, num_bits).view(torch.uint8)[0].tolist()) == words


def test_words_that_cannot_hold_the_codes_are_refused() -> None:
    packed = pack(torch.zeros(1, 16, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="2 words do not hold 17 codes of 4 bits"):
        unpack(packed, 4, 17)
