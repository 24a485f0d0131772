"""Codes in bit planes (`formats.planes`), unpacked in the registers of a GPU into float16, for tensor cores."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def tiles(codes, n, here, x, WORDS: tl.constexpr, X: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of the tokens n, each plane cut into pieces of X words: of each piece (tokens, X)."""
    words = ()
    for piece in tl.static_range(WORDS // X):
        words += (tl.load(codes + n[:, None] * WORDS + (piece * X + x)[None, :], here[:, None], 0),)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def numbers(  # type: ignore[no-untyped-def]
    words, S: tl.constexpr, J: tl.constexpr, levels, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr,
    D: tl.constexpr, SEG: tl.constexpr, UNIT: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Byte J of the words of segment S of channels: numbers (tokens, words) in float16, in units of `one`."""
    PIECES_0: tl.constexpr = D * WIDTH_0 // 8 // SEG
    AT_0: tl.constexpr = WIDTH_0 * (S // PIECES_0)
    # A whole number below 1024 is the float16, subnormal, of that many times 2^-24.
    if FAST and TYPE == "int":
        x = _bits(words[S % PIECES_0], J, AT_0, WIDTH_0, UNIT)
        if WIDTH_1:
            PIECES_1: tl.constexpr = D * WIDTH_1 // 8 // SEG
            high = _bits(words[PIECES_0 + S % PIECES_1], J, WIDTH_1 * (S // PIECES_1), WIDTH_1, UNIT)
            x = _add_times(x, high, WIDTH_0)
        return x
    code = words[S % PIECES_0].to(tl.int32) >> (8 * J + AT_0) & (1 << WIDTH_0) - 1
    if WIDTH_1:
        PIECES: tl.constexpr = D * WIDTH_1 // 8 // SEG
        more = words[PIECES_0 + S % PIECES].to(tl.int32) >> (8 * J + WIDTH_1 * (S // PIECES))
        code |= (more & (1 << WIDTH_1) - 1) << WIDTH_0
    if TYPE == "table":
        return tl.load(levels + code).to(tl.float16)
    if TYPE == "float":
        # E4M3 has float16's form with fewer bits, its exponents counted from 7 instead of 15.
        code = (code & 127) << 7 | (code & 128) << 8
    return code.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _bits(x, J: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """WIDTH bits of byte J of words, from bit AT, as float16, two at once: what `numbers` does without an assembler
    takes twice the instructions. Two words' halves move into one register but once, however many fields are cut out."""
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    if UNIT == 4:
        HALVES: tl.constexpr = 0x5410 + 0x2222 * (J // 2)
        SHIFT: tl.constexpr = 8 * (J % 2) + AT
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {HALVES}; shr.u32 t, t, {SHIFT}; and.b32 $0, t, {MASK}; }}",
            "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    if UNIT == 2:
        DOWN: tl.constexpr = 8 * J + AT
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {DOWN}; and.b32 $0, t, {MASK}; }}",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; prmt.b32 t, $2, 0, 0x4140; shr.u32 t, t, {AT}; and.b32 $0, t, {MASK}; "
        f"prmt.b32 t, $2, 0, 0x4342; shr.u32 t, t, {AT}; and.b32 $1, t, {MASK}; }}",
        "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _add_times(x, y, POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    """x + 2^POWER y of float16, two at once."""
    TIMES: tl.constexpr = (15 + POWER) * 0x4000400
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; mov.b32 t, {TIMES}; fma.rn.f16x2 $0, $2, t, $1; }}",
        "=r,r,r", [x, y], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def one(TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What 1 in `numbers` is worth."""
    if TYPE == "table":
        return 1.0
    return 256.0 if TYPE == "float" else 16777216.0


@triton.jit  # type: ignore[untyped-decorator]
def ranges(scale, offset, at, here, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales and offsets, float32; of symmetric ranges, the offset that a code in the middle answers for."""
    s = tl.load(scale + at, here, 1.0).to(tl.float32)
    if offset is None:
        return s, s * (-ZERO)
    return s, tl.load(offset + at, here, 0.0).to(tl.float32)
