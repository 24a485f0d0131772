"""Codes in bit planes (`kv.planes`), unpacked in the registers of a GPU into float16, for tensor cores."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def tiles(codes, n, here, x, BYTES: tl.constexpr, X: tl.constexpr, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of UNIT bytes of the tokens n, each plane cut into pieces of X words: of each piece (tokens, X)."""
    words = ()
    for piece in tl.static_range(BYTES // UNIT // X):
        words += (tl.load(codes + n[:, None] * (BYTES // UNIT) + (piece * X + x)[None, :], here[:, None], 0),)
    return words


@triton.jit  # type: ignore[untyped-decorator]
def numbers(  # type: ignore[no-untyped-def]
    words, S: tl.constexpr, J: tl.constexpr, levels, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr,
    D: tl.constexpr, SEG: tl.constexpr, UNIT: tl.constexpr, TYPE: tl.constexpr, FAST: tl.constexpr,
    PLANE: tl.constexpr,
):  # fmt: skip
    """Byte J of the words of segment S of channels: numbers (tokens, words) in float16, in units of `one`.

    Whole numbers are the sum of what their planes hold, and PLANE says of which: a product for each costs less than
    putting them together. Of other types it is 0, and numbers are whole."""
    PIECES_0: tl.constexpr = D * WIDTH_0 // 8 // SEG
    PIECES_1: tl.constexpr = D * WIDTH_1 // 8 // SEG
    AT_0: tl.constexpr = WIDTH_0 * (S // PIECES_0)
    # A whole number below 1024 is the float16, subnormal, of that many times 2^-24.
    if PLANE == 1:
        AT_1: tl.constexpr = WIDTH_1 * (S // PIECES_1)
        return _bits(words[PIECES_0 + S % PIECES_1], J, AT_1, WIDTH_1, WIDTH_0, UNIT, FAST)
    if TYPE == "int":
        return _bits(words[S % PIECES_0], J, AT_0, WIDTH_0, 0, UNIT, FAST)
    code = words[S % PIECES_0].to(tl.int32) >> (8 * J + AT_0) & (1 << WIDTH_0) - 1
    if WIDTH_1:
        high = words[PIECES_0 + S % PIECES_1].to(tl.int32) >> (8 * J + WIDTH_1 * (S // PIECES_1))
        code |= (high & (1 << WIDTH_1) - 1) << WIDTH_0
    if TYPE == "table":
        return tl.load(levels + code).to(tl.float16)
    # E4M3 has float16's form with fewer bits, its exponents counted from 7 instead of 15.
    return ((code & 127) << 7 | (code & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def number_at(  # type: ignore[no-untyped-def]
    codes, n, here, c, levels, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Of each of the tokens n the number of a channel c of its own, (tokens,) float32, in units of 1."""
    BYTES_0: tl.constexpr = D * WIDTH_0 // 8
    BYTES_1: tl.constexpr = D * WIDTH_1 // 8
    at = codes.to(tl.pointer_type(tl.uint8)) + n * (BYTES_0 + BYTES_1)
    code = tl.load(at + c % BYTES_0, here, 0).to(tl.int32) >> WIDTH_0 * (c // BYTES_0) & (1 << WIDTH_0) - 1
    if WIDTH_1:
        high = tl.load(at + BYTES_0 + c % BYTES_1, here, 0).to(tl.int32) >> WIDTH_1 * (c // BYTES_1)
        code |= (high & (1 << WIDTH_1) - 1) << WIDTH_0
    if TYPE == "table":
        return tl.load(levels + code).to(tl.float32)
    if TYPE == "float":
        half = ((code & 127) << 7 | (code & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    return code.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _bits(  # type: ignore[no-untyped-def]
    x, J: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, TO: tl.constexpr, UNIT: tl.constexpr, FAST: tl.constexpr
):
    """WIDTH bits of byte J of words, from bit AT, put at bit TO, as float16. Compiled from Triton's own operations it
    would be twice the instructions: here two words are one register, the same for all that is cut out of them."""
    if not FAST:
        return ((x.to(tl.int32) >> (8 * J + AT) & (1 << WIDTH) - 1) << TO).to(tl.int16).to(tl.float16, bitcast=True)
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001 << TO
    DOWN: tl.constexpr = (8 * J if UNIT == 2 else 8 * (J % 2)) + AT - TO
    CUT: tl.constexpr = f"shr.u32 t, t, {DOWN};" if DOWN >= 0 else f"shl.b32 t, t, {-DOWN};"
    if UNIT == 2:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; mov.b32 t, $1; {CUT} and.b32 $0, t, {MASK}; }}",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    # Bytes alone first get a register each.
    if UNIT == 1:
        x = x.to(tl.int32)
    HALVES: tl.constexpr = 0x5410 + 0x2222 * (J // 2)
    return tl.inline_asm_elementwise(
        f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {HALVES}; {CUT} and.b32 $0, t, {MASK}; }}",
        "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
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
        o = s * (-ZERO)
    else:
        o = tl.load(offset + at, here, 0.0).to(tl.float32)
    return s, o
