"""The kernel that writes one new token of each sequence into packed pages.

A program writes one head of one sequence: the exact token, and, where the token completes a unit, the codes, ranges and
outliers of the unit, as `kv.format.encode_kv` computes them. It needs no look at lengths on the host, so a CUDA graph
replays it. Tiles are (tokens of a unit, channels) float32. Constants are those of `serving.attend_pages_triton`.
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def write_pages(  # type: ignore[no-untyped-def]
    # New keys and values (B, H, C); pages, numbers of pages (B, P), tokens of each sequence (B,); heads of the group.
    k_new, v_new, cache, table, lengths, group_heads,
    # Static ranges (H, C) and levels of keys and of values; rotary embedding of every position (positions, C).
    k_static_scales, k_static_offsets, k_levels, v_static_scales, v_static_offsets, v_levels, cos, sin,
    # Key-value heads of the group; strides in bytes, but in numbers of `table` and of sequences of new keys and values.
    heads, page_stride, head_stride, table_stride, k_stride, v_stride,
    K_CODES_AT: tl.constexpr, K_SCALES_AT: tl.constexpr, K_OFFSETS_AT: tl.constexpr, K_INDEX_AT: tl.constexpr,
    K_OUTLIERS_AT: tl.constexpr, K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_TYPE: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr, K_OUTLIERS: tl.constexpr,
    V_CODES_AT: tl.constexpr, V_SCALES_AT: tl.constexpr, V_OFFSETS_AT: tl.constexpr, V_INDEX_AT: tl.constexpr,
    V_OUTLIERS_AT: tl.constexpr, V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_TYPE: tl.constexpr,
    V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr, V_OUTLIERS: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, SINKS_AT: tl.constexpr, RECENT_AT: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, EXACT_TYPE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the exact token, and the unit that it completes."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    if group_heads is not None:
        h = tl.load(group_heads + h)
    position = tl.load(lengths + b) - 1
    # Padding of a batch has no tokens.
    if position >= 0:
        number = tl.load(table + b * table_stride + position // PAGE).to(tl.int64)
        page = tl.multiple_of(cache + number * page_stride + h.to(tl.int64) * head_stride, 16)
        k_new += b * k_stride + h * CHANNELS
        v_new += b * v_stride + h * CHANNELS
        c = tl.arange(0, CHANNELS)
        if RECENT:
            recent = (page + RECENT_AT).to(tl.pointer_type(EXACT_TYPE))
            at = recent + position % PAGE % RECENT * (2 * CHANNELS)
            tl.store(at + c, tl.load(k_new + c).to(EXACT_TYPE))
            tl.store(at + CHANNELS + c, tl.load(v_new + c).to(EXACT_TYPE))
        if position < SINKS:
            at = (page + SINKS_AT).to(tl.pointer_type(EXACT_TYPE)) + position * (2 * CHANNELS)
            tl.store(at + c, tl.load(k_new + c).to(EXACT_TYPE))
            tl.store(at + CHANNELS + c, tl.load(v_new + c).to(EXACT_TYPE))
        if position % UNIT == UNIT - 1:
            i = tl.arange(0, UNIT)
            n = position - (UNIT - 1) + i
            # The last token of the unit is the new one, which other threads may still be storing.
            before = (page + RECENT_AT).to(tl.pointer_type(EXACT_TYPE))
            before += (n % PAGE % (RECENT if RECENT else 1) * (2 * CHANNELS))[:, None]
            is_new = (i == UNIT - 1)[:, None]
            keys = _token_tile(before, k_new, is_new, c)
            if cos is not None:
                partner = (c + CHANNELS // 2) % CHANNELS
                other = _token_tile(before, k_new, is_new, partner)
                other = tl.where((c < CHANNELS // 2)[None, :], -other, other)
                cosine = tl.load(cos + n[:, None] * CHANNELS + c[None, :])
                sine = tl.load(sin + n[:, None] * CHANNELS + c[None, :])
                keys = tl.div_rn(keys * cosine - other * sine, cosine * cosine + sine * sine)
            _encode(
                keys, page, position % PAGE - (UNIT - 1), k_static_scales, k_static_offsets, k_levels, h,
                K_CODES_AT, K_SCALES_AT, K_OFFSETS_AT, K_INDEX_AT, K_OUTLIERS_AT, K_LOW, K_HIGH, K_TYPE, K_BY_TOKEN,
                K_GROUP, K_ZERO, K_OUTLIERS, UNIT, CHANNELS, EXACT_TYPE,
            )  # fmt: skip
            values = _token_tile(before + CHANNELS, v_new, is_new, c)
            _encode(
                values, page, position % PAGE - (UNIT - 1), v_static_scales, v_static_offsets, v_levels, h,
                V_CODES_AT, V_SCALES_AT, V_OFFSETS_AT, V_INDEX_AT, V_OUTLIERS_AT, V_LOW, V_HIGH, V_TYPE, V_BY_TOKEN,
                V_GROUP, V_ZERO, V_OUTLIERS, UNIT, CHANNELS, EXACT_TYPE,
            )  # fmt: skip


@triton.jit
def _token_tile(before, new, is_new, c):  # type: ignore[no-untyped-def]
    """Load channels c of the tokens of a unit: those before the new one from the page, and the new one."""
    earlier = tl.load(before + c[None, :], ~is_new, 0.0).to(tl.float32)
    return tl.where(is_new, tl.load(new + c).to(tl.float32)[None, :], earlier)


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    x, page, slot, static_scales, static_offsets, levels, h,
    CODES_AT: tl.constexpr, SCALES_AT: tl.constexpr, OFFSETS_AT: tl.constexpr, INDEX_AT: tl.constexpr,
    OUTLIERS_AT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, TYPE: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, OUTLIERS: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
    EXACT_TYPE: tl.constexpr,
):  # fmt: skip
    """Encode a tile and store it in the slots from `slot` on."""
    BITS: tl.constexpr = LOW + HIGH
    MOST: tl.constexpr = (1 << BITS) - 1
    HALF_MOST: tl.constexpr = 65504.0
    i, c = tl.arange(0, UNIT), tl.arange(0, CHANNELS)
    # Numbers that share a range lie along the axis 1 of (A, GROUP, B).
    A: tl.constexpr = UNIT * CHANNELS // GROUP if BY_TOKEN else (UNIT // GROUP if GROUP else 1)
    B: tl.constexpr = 1 if BY_TOKEN else CHANNELS
    IN_RANGE: tl.constexpr = GROUP if GROUP else UNIT
    scale = tl.zeros((A, 1, B), tl.float32)
    offset = tl.zeros((A, 1, B), tl.float32)
    if GROUP == 0:
        scale += tl.load(static_scales + h * CHANNELS + c)[None, None, :]
        if static_offsets is not None:
            offset += tl.load(static_offsets + h * CHANNELS + c)[None, None, :]
    if OUTLIERS:
        x = _split_outliers(
            x, page, slot, scale, offset, INDEX_AT, OUTLIERS_AT, LOW, HIGH, TYPE, BY_TOKEN, GROUP, ZERO, OUTLIERS,
            UNIT, CHANNELS, EXACT_TYPE,
        )  # fmt: skip
    x = tl.reshape(x, (A, IN_RANGE, B))
    if GROUP:
        lo, hi = tl.min(x, 1, keep_dims=True), tl.max(x, 1, keep_dims=True)
        FLOAT_MOST: tl.constexpr = 448.0 if TYPE == "float" else (1.0 if TYPE == "table" else (1 << BITS - 1) - 1.0)
        if OFFSETS_AT < 0:
            scale = tl.div_rn(tl.maximum(-lo, hi), scale + FLOAT_MOST)
        elif TYPE == "int":
            scale = tl.div_rn(hi - lo, scale + (MOST + 0.0))
            offset = lo
        else:
            scale = tl.div_rn((hi - lo) / 2, scale + FLOAT_MOST)
            offset = (hi + lo) / 2
        scale_half = tl.minimum(tl.maximum(scale, 5.9604644775390625e-08), HALF_MOST).to(tl.float16)
        offset_half = tl.minimum(tl.maximum(offset, -HALF_MOST), HALF_MOST).to(tl.float16)
        scale, offset = scale_half.to(tl.float32), offset_half.to(tl.float32)
        if BY_TOKEN:
            at = slot * (CHANNELS // GROUP) + tl.arange(0, A)[:, None, None]
        else:
            at = (slot // GROUP + tl.arange(0, A)[:, None, None]) * CHANNELS + c[None, None, :]
        tl.store((page + SCALES_AT).to(tl.pointer_type(tl.float16)) + at, scale_half)
        if OFFSETS_AT >= 0:
            tl.store((page + OFFSETS_AT).to(tl.pointer_type(tl.float16)) + at, offset_half)
    u = tl.reshape(tl.div_rn(x - offset, tl.broadcast_to(scale, (A, IN_RANGE, B))), (UNIT, CHANNELS))
    if TYPE == "float":
        codes = _to_e4m3(u)
    elif TYPE == "table":
        codes = tl.zeros((UNIT, CHANNELS), tl.int32)
        for level in tl.static_range(MOST):
            border = (tl.load(levels + level + 1) + tl.load(levels + level)) / 2
            codes += (u > border).to(tl.int32)
    else:
        # Adding 1.5 x 2^23 rounds to integers, halves to even.
        u = tl.minimum(tl.maximum(u + ZERO, 0.0), MOST + 0.0)
        codes = ((u + 12582912.0) - 12582912.0).to(tl.int32)
    codes_at = page + CODES_AT + (slot + i)[:, None] * (CHANNELS * BITS // 8)
    _store_plane(codes_at, codes & ((1 << LOW) - 1), LOW, UNIT, CHANNELS)
    if HIGH:
        _store_plane(codes_at + CHANNELS * LOW // 8, codes >> LOW, HIGH, UNIT, CHANNELS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_plane(at, codes, BITS: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store one bit plane: fields of BITS bits of bytes, neighbouring channels in neighbouring bytes."""
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.reshape(codes, (UNIT, FIELDS, CHANNELS // FIELDS)) << (tl.arange(0, FIELDS) * BITS)[None, :, None]
    tl.store(at + tl.arange(0, CHANNELS // FIELDS)[None, :], tl.sum(fields, 1).to(tl.uint8))


@triton.jit  # type: ignore[untyped-decorator]
def _split_outliers(  # type: ignore[no-untyped-def]
    x, page, slot, scale, offset, INDEX_AT: tl.constexpr, OUTLIERS_AT: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    OUTLIERS: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, EXACT_TYPE: tl.constexpr,
):  # fmt: skip
    """Store the numbers farthest from the middle of their range, and return x with the middle in their place."""
    i, c = tl.arange(0, UNIT)[:, None], tl.arange(0, CHANNELS)[None, :]
    if BY_TOKEN:
        middle = _median(x, CHANNELS)[:, None] + tl.zeros((UNIT, CHANNELS), tl.float32)
        distance = tl.abs(x - middle)
    elif GROUP:
        SETS: tl.constexpr = UNIT // GROUP * CHANNELS
        across = tl.permute(tl.reshape(x, (UNIT // GROUP, GROUP, CHANNELS)), (0, 2, 1))
        across = tl.reshape(across, (SETS, GROUP))
        center = _median(across, GROUP)[:, None]
        spread = tl.maximum(_median(tl.abs(across - center), GROUP), 1e-12)[:, None]
        zeros = tl.zeros((SETS, GROUP), tl.float32)
        middle = _back(center + zeros, UNIT, CHANNELS, GROUP)
        distance = tl.abs(tl.div_rn(x - middle, _back(spread + zeros, UNIT, CHANNELS, GROUP)))
    else:
        scale, middle = tl.reshape(scale, (1, CHANNELS)), tl.reshape(offset, (1, CHANNELS))
        if TYPE == "int" and ZERO == 0:
            middle = middle + scale * ((1 << LOW + HIGH) - 1.0) / 2
        zeros = tl.zeros((UNIT, CHANNELS), tl.float32)
        middle = middle + zeros
        distance = tl.abs(tl.div_rn(x - middle, scale + zeros))
    chosen = c < tl.zeros((UNIT, CHANNELS), tl.int32)
    for _ in tl.static_range(OUTLIERS):
        farthest = tl.argmax(tl.where(chosen, -1.0, distance), 1)[:, None]
        chosen = chosen | (c == farthest)
    last = tl.full((UNIT, 1), -1, tl.int32)
    for j in tl.static_range(OUTLIERS):
        last = tl.min(tl.where(chosen & (c > last), c, CHANNELS), 1, keep_dims=True)
        value = tl.sum(tl.where(c == last, x, 0.0), 1, keep_dims=True)
        at = (slot + i) * OUTLIERS + j
        tl.store(page + INDEX_AT + at, last.to(tl.uint8))
        tl.store((page + OUTLIERS_AT).to(tl.pointer_type(EXACT_TYPE)) + at, value.to(EXACT_TYPE))
    return tl.where(chosen, middle, x)


@triton.jit  # type: ignore[untyped-decorator]
def _median(x, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the lower median of each row, as torch computes it, bit by bit: the largest number with few below it."""
    keys = x.to(tl.int32, bitcast=True)
    # Integers in the order of the numbers.
    keys ^= (keys >> 31) & 0x7FFFFFFF
    negative = tl.sum((keys < 0).to(tl.int32), 1)
    median = tl.where(negative > (LENGTH - 1) // 2, -2147483648, 0)
    step = tl.full(median.shape, 1 << 30, tl.int32)
    for _ in range(31):
        below = tl.sum((keys < (median + step)[:, None]).to(tl.int32), 1)
        median = tl.where(below > (LENGTH - 1) // 2, median, median + step)
        step = step >> 1
    median ^= (median >> 31) & 0x7FFFFFFF
    return median.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _back(x, UNIT: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lay numbers of groups (groups times channels, GROUP) out as (UNIT, CHANNELS) again."""
    return tl.reshape(tl.permute(tl.reshape(x, (UNIT // GROUP, CHANNELS, GROUP)), (0, 2, 1)), (UNIT, CHANNELS))


@triton.jit
def _to_e4m3(u):  # type: ignore[no-untyped-def]
    """Return FP8 E4M3 numbers as integers, rounded to nearest, halves to even, within +-448."""
    size = tl.minimum(tl.abs(u), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Normal numbers: three bits of the mantissa remain, and exponents are counted from 7 instead of 127.
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(size < 0.015625, small, normal) | tl.where(u < 0, 128, 0)
