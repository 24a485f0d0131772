"""Codes in bit planes (`kv.planes`), unpacked in the registers of a GPU into float16, for tensor cores.

Words of several bytes are loaded, and byte J of all words makes a tile (tokens, words) of its own: the numbers of the
channels J, J + WORD_BYTES, and so on, of a segment. Constants:

    LOW, HIGH    bits of the first and of the second bit plane (0: none)
    CHANNELS     channels of a head
    SEGMENT      channels of a segment (`kv.packed.segment`)
    WORD_BYTES   bytes of a word; a segment is SEGMENT / WORD_BYTES words
    TYPE         datatype of the format: int, table or float
    ASSEMBLER    whether to use inline assembler, which the interpreter does not have

Arguments of all functions:

    codes        pointer to the first word of a head
    n, mask      tokens, and whether each exists
    x            numbers of the words of a tile, 0 to WORDS - 1
    words        tiles of `load_words`
    S, J         number of the segment, and of the byte of its words
    levels       pointer to the levels of a table; None for other types
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def load_words(  # type: ignore[no-untyped-def]
    codes, n, mask, x, BYTES: tl.constexpr, WORDS: tl.constexpr, WORD_BYTES: tl.constexpr
):
    """Load the BYTES of each token n as words, in tiles (tokens, WORDS)."""
    words = ()
    for i in tl.static_range(BYTES // WORD_BYTES // WORDS):
        words += (tl.load(codes + n[:, None] * (BYTES // WORD_BYTES) + (i * WORDS + x)[None, :], mask[:, None], 0),)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def numbers_of(  # type: ignore[no-untyped-def]
    words, S: tl.constexpr, J: tl.constexpr, levels, LOW: tl.constexpr, HIGH: tl.constexpr,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr, TYPE: tl.constexpr,
    ASSEMBLER: tl.constexpr, PLANE: tl.constexpr,
):  # fmt: skip
    """Unpack byte J of the words of segment S: numbers (tokens, words) in float16, in units of 1 / `unit_of`.

    An integer is the sum of what its planes hold, and PLANE says of which: a product for each plane costs less than
    joining them. Of other types PLANE is 0, and numbers are complete. Bits of the first plane stay at their place in
    the byte, which saves shifting them.
    """
    LOW_TILES: tl.constexpr = CHANNELS * LOW // 8 // SEGMENT
    HIGH_TILES: tl.constexpr = CHANNELS * HIGH // 8 // SEGMENT
    LOW_BIT: tl.constexpr = LOW * (S // LOW_TILES)
    # An integer below 1024 has the bits of the subnormal float16 that is 2^-24 times as large.
    if PLANE == 1:
        HIGH_BIT: tl.constexpr = HIGH * (S // HIGH_TILES)
        TO: tl.constexpr = LOW_BIT + LOW
        return _extract_bits(words[LOW_TILES + S % HIGH_TILES], J, HIGH_BIT, HIGH, TO, WORD_BYTES, ASSEMBLER)
    if TYPE == "int":
        return _extract_bits(words[S % LOW_TILES], J, LOW_BIT, LOW, LOW_BIT, WORD_BYTES, ASSEMBLER)
    if TYPE == "float" and ASSEMBLER:
        return _extract_e4m3(words[S % LOW_TILES], J, WORD_BYTES)
    code = words[S % LOW_TILES].to(tl.int32) >> (8 * J + LOW_BIT) & (1 << LOW) - 1
    if HIGH:
        high = words[LOW_TILES + S % HIGH_TILES].to(tl.int32) >> (8 * J + HIGH * (S // HIGH_TILES))
        code |= (high & (1 << HIGH) - 1) << LOW
    if TYPE == "table":
        return tl.load(levels + code).to(tl.float16)
    return _e4m3_as_half(code)


@triton.jit  # type: ignore[untyped-decorator]
def number_at(  # type: ignore[no-untyped-def]
    codes, n, mask, c, levels, LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Load the number of channel c of each token n, c being different for each: (tokens,) float32, in units of 1."""
    LOW_BYTES: tl.constexpr = CHANNELS * LOW // 8
    HIGH_BYTES: tl.constexpr = CHANNELS * HIGH // 8
    token = codes.to(tl.pointer_type(tl.uint8)) + n * (LOW_BYTES + HIGH_BYTES)
    code = tl.load(token + c % LOW_BYTES, mask, 0).to(tl.int32) >> LOW * (c // LOW_BYTES) & (1 << LOW) - 1
    if HIGH:
        high = tl.load(token + LOW_BYTES + c % HIGH_BYTES, mask, 0).to(tl.int32) >> HIGH * (c // HIGH_BYTES)
        code |= (high & (1 << HIGH) - 1) << LOW
    if TYPE == "table":
        return tl.load(levels + code).to(tl.float32)
    if TYPE == "float":
        return _e4m3_as_half(code).to(tl.float32) * 256.0
    return code.to(tl.float32)


@triton.jit
def _e4m3_as_half(code):  # type: ignore[no-untyped-def]
    """Return FP8 E4M3 numbers divided by 256: float16 has the same form with its exponents counted from 15, not 7."""
    return ((code & 127) << 7 | (code & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _extract_e4m3(x, J: tl.constexpr, WORD_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return byte J of words, FP8 E4M3 numbers, as `_e4m3_as_half` does: two words in one register."""
    # The number is in the upper byte of each half: its sign stays, and the rest moves by a bit.
    MOVE: tl.constexpr = "shr.u32 u, t, 1; and.b32 u, u, 0x3f803f80; and.b32 t, t, 0x80008000; or.b32 $0, t, u;"
    if WORD_BYTES == 2:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, u; shl.b32 t, $1, {8 - 8 * J}; {MOVE} }}",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    if WORD_BYTES == 1:
        x = x.to(tl.int32)
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t, u; prmt.b32 t, $1, $2, {0x4400 + 0x1111 * J}; {MOVE} }}",
        "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _extract_bits(  # type: ignore[no-untyped-def]
    x, J: tl.constexpr, BIT: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr, WORD_BYTES: tl.constexpr,
    ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Move BITS bits of byte J of words, from bit BIT on, to bit TO, and return them as float16.

    Compiled from Triton's own operations it would be twice as many instructions: here two words are one register, the
    same for all that is extracted from them.
    """
    if not ASSEMBLER:
        return ((x.to(tl.int32) >> (8 * J + BIT) & (1 << BITS) - 1) << TO).to(tl.int16).to(tl.float16, bitcast=True)
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001 << TO
    DOWN: tl.constexpr = (8 * J if WORD_BYTES == 2 else 0) + BIT - TO
    SHIFT: tl.constexpr = f"shr.u32 t, t, {DOWN};" if DOWN >= 0 else f"shl.b32 t, t, {-DOWN};"
    if WORD_BYTES == 2:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; mov.b32 t, $1; {SHIFT} and.b32 $0, t, {MASK}; }}",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    # Single bytes are widened to a register each first.
    if WORD_BYTES == 1:
        x = x.to(tl.int32)
    # Byte J of either word, twice.
    HALVES: tl.constexpr = 0x4400 + 0x1111 * J
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {HALVES}; {SHIFT} and.b32 $0, t, {MASK}; }}",
        "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def unit_of(  # type: ignore[no-untyped-def]
    TYPE: tl.constexpr, S: tl.constexpr, LOW: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Return the factor by which numbers of `numbers_of` in segment S are too small."""
    if TYPE == "table":
        return 1.0
    if TYPE == "float":
        return 256.0
    return 16777216.0 / (1 << LOW * (S // (CHANNELS * LOW // 8 // SEGMENT)))


@triton.jit  # type: ignore[untyped-decorator]
def load_ranges(scales, offsets, at, mask, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load scales and offsets, float32; offsets are None for symmetric ranges, whose code of zero is ZERO."""
    scale = tl.load(scales + at, mask, 1.0).to(tl.float32)
    if offsets is None:
        offset = scale * (-ZERO)
    else:
        offset = tl.load(offsets + at, mask, 0.0).to(tl.float32)
    return scale, offset
