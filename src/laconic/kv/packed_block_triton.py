"""Parts of the kernel of `kv_attention` that work on one block of packed tokens, for keys or for values.

Tiles and constants are those of `kv.attend_packed_triton`, without K_ or V_. Other arguments:

    words                       words of the block's codes (`load_words`)
    levels, scales, offsets     of the format; None for those that it lacks
    at                          index of the head's first range
    t_stride, c_stride          strides of ranges by token (or group of tokens) and by channel
    n, here, start              tokens of the block, whether each exists, and the first of them
    x                           numbers of the words of a tile
    q_rows, row_mask            pointers to the first channel of each row's query, and whether the row exists
    queries, query_sums, top    results of `load_queries`
    range_scales, range_offsets results of `load_block_ranges`
    cos, sin, angle             rotary angles of packed keys (None: none), and the index of the sequence's first
    codes, outliers             pointers to the head's codes and outliers
    c                           a channel for each token
    acc, lifts                  sums so far: of weighted values, tiles (words, rows); of weighted offsets, (rows,)
    p, p_sum, rescale           weights of a block's tokens, (tokens, rows), their sum, and the factor of earlier sums
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from laconic.kv.planes_triton import load_ranges, number_at, numbers_of, unit_of


@triton.jit  # type: ignore[untyped-decorator]
def load_queries(  # type: ignore[no-untyped-def]
    q_rows, mask, x, scaling,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load scaled queries as tiles (words, rows) of size at most 1; return tiles, sums of segments, and their factor.

    Thus no scale of a key lifts a query above float16's range.
    """
    WORDS: tl.constexpr = SEGMENT // WORD_BYTES
    top = tl.zeros((ROWS,), tl.float32)
    loaded = ()
    for i in tl.static_range(CHANNELS // WORDS):
        c = (i // WORD_BYTES) * SEGMENT + x * WORD_BYTES + i % WORD_BYTES
        tile = tl.load(q_rows[None, :] + c[:, None], mask[None, :], 0.0).to(tl.float32) * scaling
        top = tl.maximum(top, tl.max(tl.abs(tile), 0))
        loaded += (tile,)
    top = tl.where(top > 0, top, 1.0)
    tiles = ()
    for i in tl.static_range(CHANNELS // WORDS):
        tiles += (loaded[i] / top[None, :],)
    sums = ()
    for s in tl.static_range(CHANNELS // SEGMENT):
        segment_sum = tl.zeros((ROWS,), tl.float32)
        for j in tl.static_range(WORD_BYTES):
            segment_sum += tl.sum(tiles[s * WORD_BYTES + j], 0)
        sums += (segment_sum,)
    return tiles, sums, top


@triton.jit  # type: ignore[untyped-decorator]
def load_block_ranges(  # type: ignore[no-untyped-def]
    scales, offsets, at, n, here, start, x, t_stride, c_stride,
    CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Load the scales and offsets of a block: of tokens for each segment, or of channels for each tile.

    All at once and before anything waits: where each is loaded just before its use, a block waits as many times.
    """
    range_scales = ()
    range_offsets = ()
    for i in tl.static_range(CHANNELS // SEGMENT if BY_TOKEN else CHANNELS // SEGMENT * WORD_BYTES):
        if BY_TOKEN:
            index = at + n * t_stride + i * SEGMENT // GROUP
            mask = here
        else:
            c = (i // WORD_BYTES) * SEGMENT + x * WORD_BYTES + i % WORD_BYTES
            index = at + (start // GROUP if GROUP else 0) * t_stride + c * c_stride
            mask = c < CHANNELS
        scale = tl.load(scales + index, mask, 1.0)
        range_scales += (scale,)
        if offsets is None:
            range_offsets += (scale.to(tl.float32) * (-ZERO),)
        else:
            range_offsets += (tl.load(offsets + index, mask, 0.0),)
    return range_scales, range_offsets


@triton.jit  # type: ignore[untyped-decorator]
def block_logits(  # type: ignore[no-untyped-def]
    words, queries, query_sums, top, levels, range_scales, range_offsets,
    LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, ASSEMBLER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the logits of a block, (tokens, rows), without outliers."""
    PLANES: tl.constexpr = 2 if HIGH and TYPE == "int" else 1
    WORDS: tl.constexpr = SEGMENT // WORD_BYTES
    logits = tl.zeros((BLOCK, ROWS), tl.float32)
    if BY_TOKEN:
        for s in tl.static_range(CHANNELS // SEGMENT):
            scale, offset = range_scales[s].to(tl.float32), range_offsets[s].to(tl.float32)
            product = tl.zeros((BLOCK, ROWS), tl.float32)
            for j in tl.static_range(WORD_BYTES):
                query = queries[s * WORD_BYTES + j].to(tl.float16)
                for plane in tl.static_range(PLANES):
                    codes = numbers_of(
                        words, s, j, levels, LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, ASSEMBLER, plane
                    )
                    product = tl.dot(codes, query, product)
            unit = unit_of(TYPE, s, LOW, CHANNELS, SEGMENT)
            logits += product * (scale * unit)[:, None] + offset[:, None] * query_sums[s][None, :]
        logits *= top[None, :]
    else:
        first_unit = unit_of(TYPE, 0, LOW, CHANNELS, SEGMENT)
        lift = tl.zeros((WORDS, ROWS), tl.float32)
        for i in tl.static_range(CHANNELS // WORDS):
            scale, offset = range_scales[i].to(tl.float32), range_offsets[i].to(tl.float32)
            lift += queries[i] * offset[:, None]
            # All segments in the unit of the first.
            unit = unit_of(TYPE, i // WORD_BYTES, LOW, CHANNELS, SEGMENT)
            query = (queries[i] * (scale * (unit / first_unit))[:, None]).to(tl.float16)
            for plane in tl.static_range(PLANES):
                codes = numbers_of(
                    words, i // WORD_BYTES, i % WORD_BYTES, levels, LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE,
                    ASSEMBLER, plane,
                )  # fmt: skip
                logits = tl.dot(codes, query, logits)
        logits = logits * (top * first_unit)[None, :] + (tl.sum(lift, 0) * top)[None, :]
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def rotary_block_logits(  # type: ignore[no-untyped-def]
    words, queries, cos, sin, angle_rows, levels, range_scales, range_offsets, here, x,
    LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, ASSEMBLER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the logits of a block, (tokens, rows), without outliers and the factor of queries.

    Keys are stored before their rotary embedding: each is decoded here and rotated by its token's angle before the
    product with the query.
    """
    WORDS: tl.constexpr = SEGMENT // WORD_BYTES
    logits = tl.zeros((BLOCK, ROWS), tl.float32)
    for s in tl.static_range(CHANNELS // SEGMENT // 2):
        for j in tl.static_range(WORD_BYTES):
            c = s * SEGMENT + x * WORD_BYTES + j
            low = _keys(
                words, s, j, levels, range_scales, range_offsets,
                LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, BY_TOKEN, ASSEMBLER,
            )  # fmt: skip
            high = _keys(
                words, s + CHANNELS // SEGMENT // 2, j, levels, range_scales, range_offsets,
                LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, BY_TOKEN, ASSEMBLER,
            )  # fmt: skip
            cosine = tl.load(cos + angle_rows + c[None, :], here[:, None], 0.0).to(tl.float32)
            sine = tl.load(sin + angle_rows + c[None, :], here[:, None], 0.0).to(tl.float32)
            first_half = (low * cosine - high * sine).to(tl.float16)
            second_half = (high * cosine + low * sine).to(tl.float16)
            logits = tl.dot(first_half, queries[s * WORD_BYTES + j].to(tl.float16), logits)
            logits = tl.dot(second_half, queries[s * WORD_BYTES + j + CHANNELS // WORDS // 2].to(tl.float16), logits)
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def _keys(  # type: ignore[no-untyped-def]
    words, S: tl.constexpr, J: tl.constexpr, levels, range_scales, range_offsets,
    LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Decode byte J of the words of segment S: keys (tokens, words) float32."""
    codes = numbers_of(words, S, J, levels, LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, ASSEMBLER, 0)
    if HIGH and TYPE == "int":
        codes += numbers_of(words, S, J, levels, LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, ASSEMBLER, 1)
    unit = unit_of(TYPE, S, LOW, CHANNELS, SEGMENT)
    if BY_TOKEN:
        scale, offset = range_scales[S].to(tl.float32), range_offsets[S].to(tl.float32)
        return codes.to(tl.float32) * (scale * unit)[:, None] + offset[:, None]
    TILE: tl.constexpr = S * WORD_BYTES + J
    scale, offset = range_scales[TILE].to(tl.float32), range_offsets[TILE].to(tl.float32)
    return codes.to(tl.float32) * (scale * unit)[None, :] + offset[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def outlier_excess(  # type: ignore[no-untyped-def]
    codes, outliers, c, J: tl.constexpr, levels, scales, offsets, at, n, here, start, t_stride, c_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, TYPE: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, OUTLIERS: tl.constexpr,
):  # fmt: skip
    """Compute the difference of outlier J of each token, in channel c, from its decoded code: (tokens,) float32."""
    if BY_TOKEN:
        at = at + n * t_stride + c // GROUP
    else:
        at = at + (start // GROUP if GROUP else 0) * t_stride + c * c_stride
    scale, offset = load_ranges(scales, offsets, at, here, ZERO)
    excess = tl.load(outliers + n * OUTLIERS + J, here, 0.0).to(tl.float32)
    excess -= number_at(codes, n, here, c, levels, LOW, HIGH, CHANNELS, TYPE) * scale + offset
    return excess


@triton.jit  # type: ignore[untyped-decorator]
def query_channel(q_rows, row_mask, c, n, here, cos, sin, angle, scaling, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load channel c of the scaled queries, rotated by the token's angle, c being different for each token n."""
    query = tl.load(q_rows[None, :] + c[:, None], row_mask[None, :], 0.0).to(tl.float32) * scaling
    if cos is not None:
        partner = (c + CHANNELS // 2) % CHANNELS
        other = tl.load(q_rows[None, :] + partner[:, None], row_mask[None, :], 0.0).to(tl.float32)
        at = angle + n * (CHANNELS // 2) + c % (CHANNELS // 2)
        query *= tl.load(cos + at, here, 0.0).to(tl.float32)[:, None]
        sine = tl.load(sin + at, here, 0.0).to(tl.float32)
        query += other * scaling * tl.where(c < CHANNELS // 2, sine, -sine)[:, None]
    return query


@triton.jit  # type: ignore[untyped-decorator]
def add_channel(  # type: ignore[no-untyped-def]
    acc, x, c, words, LOW: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Add x (tokens, rows) to channel c of the sums, c being different for each token."""
    next_acc = ()
    for i in tl.static_range(CHANNELS // (SEGMENT // WORD_BYTES)):
        channel = (i // WORD_BYTES) * SEGMENT + words * WORD_BYTES + i % WORD_BYTES
        # With ranges of tokens, sums are in the unit of their segment.
        unit = 1.0
        if BY_TOKEN:
            unit = unit_of(TYPE, i // WORD_BYTES, LOW, CHANNELS, SEGMENT)
        one_hot = tl.where(channel[:, None] == c[None, :], 1 / unit, 0.0)
        next_acc += (tl.dot(one_hot, x, acc[i], input_precision="tf32"),)
    return next_acc


@triton.jit  # type: ignore[untyped-decorator]
def add_values(  # type: ignore[no-untyped-def]
    words, acc, lifts, p, p_sum, rescale, levels, range_scales, range_offsets,
    LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, WORD_BYTES: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, ASSEMBLER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rescale the sums so far, and add the values of a block, weighted by p (tokens, rows).

    With ranges of tokens, scales are in the weights, and offsets are summed in `lifts`; with ranges of channels both go
    into the sums.
    """
    PLANES: tl.constexpr = 2 if HIGH and TYPE == "int" else 1
    WORDS: tl.constexpr = SEGMENT // WORD_BYTES
    next_acc = ()
    next_lifts = ()
    for s in tl.static_range(CHANNELS // SEGMENT):
        weights = p
        if BY_TOKEN:
            scale, offset = range_scales[s].to(tl.float32), range_offsets[s].to(tl.float32)
            weights = p * scale[:, None]
            next_lifts += (lifts[s] * rescale + tl.sum(p * offset[:, None], 0),)
        weights = weights.to(tl.float16)
        for j in tl.static_range(WORD_BYTES):
            rescaled = acc[s * WORD_BYTES + j] * rescale[None, :]
            product = rescaled if BY_TOKEN else tl.zeros((WORDS, ROWS), tl.float32)
            for plane in tl.static_range(PLANES):
                codes = numbers_of(
                    words, s, j, levels, LOW, HIGH, CHANNELS, SEGMENT, WORD_BYTES, TYPE, ASSEMBLER, plane
                )
                product = tl.dot(tl.trans(codes), weights, product)
            if BY_TOKEN:
                next_acc += (product,)
            else:
                scale = range_scales[s * WORD_BYTES + j].to(tl.float32)
                offset = range_offsets[s * WORD_BYTES + j].to(tl.float32)
                unit = unit_of(TYPE, s, LOW, CHANNELS, SEGMENT)
                next_acc += (rescaled + product * (scale * unit)[:, None] + offset[:, None] * p_sum[None, :],)
    return next_acc, next_lifts if BY_TOKEN else lifts
