"""The kernel of `kv_attention`: attention of some rows over one split of the tokens of a key-value head.

A *row* is one of the queries (query heads times new tokens) that share the key-value head. Codes enter tensor cores as
the small integers they are, and ranges are multiplied into the smaller side: a key channel's scale into the query, a
token's scale into its logit or its probability, a value channel's scale into the sum over a block of tokens that share
it.

Words of several bytes are loaded, and byte J of all words makes a product of its own (`kv.planes_triton`). The two
numbers that a tensor core needs side by side are then the same bits of two words, without moving bytes, for keys (two
channels) as for values (two tokens). Tile i = S WORD_BYTES + J holds byte J of the words of segment S: channels S
SEGMENT + WORD_BYTES x + J, x counting words. A sum over channels may have any order, and values go to their channels
when they are stored.

Constants of keys begin with K_, those of values with V_; to those of `kv.planes_triton` they add

    BY_TOKEN     whether ranges are of tokens (of a group of channels), or of channels (of a group of tokens)
    GROUP        numbers that share a range; 0 for static ranges
    ZERO         code of zero of symmetric ranges
    OUTLIERS     outliers of a token
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from laconic.kv.packed_block_triton import (
    add_channel,
    add_values,
    block_logits,
    load_block_ranges,
    load_queries,
    outlier_excess,
    query_channel,
    rotary_block_logits,
)
from laconic.kv.planes_triton import load_words, unit_of
from laconic.kv.splits_triton import attend_dense, positive_or_one


# The arguments that change from one token to the next are not specialized: the kernel would be compiled again for them.
@triton.jit(do_not_specialize=["window_tokens", "sink_tokens", "sink_splits", "window_splits"])  # type: ignore[untyped-decorator]
def attend_split(  # type: ignore[no-untyped-def]
    # Queries (B, H, rows, C).
    q,
    # Packed keys and packed values: codes, scales, offsets, levels, indices of outliers, outliers.
    k_codes, k_scales, k_offsets, k_levels, k_index, k_outliers,
    v_codes, v_scales, v_offsets, v_levels, v_index, v_outliers,
    # Tokens in 16 bit.
    k_window, v_window, k_sinks, v_sinks,
    # Results: attention (B, H, rows, splits, C), log2 of the sum of exponentials (B, H, rows, splits).
    sums, log_sums,
    # First visible token of each sequence (None: all are); rotary angles of packed keys (None: none), and the stride of
    # their sequences.
    first_visible, cos, sin, angle_b,
    # Numbers of key-value heads, of packed tokens, tokens of the window, sinks, splits of sinks, splits of the window.
    heads, tokens, window_tokens, sink_tokens, sink_splits, window_splits,
    # First packed token that is read, packed tokens of a split, factor of the logits (times log2 e).
    packed_begin, split_tokens, scaling,
    # Strides by batch, head, token and channel.
    k_codes_b, k_codes_h, k_scales_b, k_scales_h, k_scales_t, k_scales_c, k_index_b, k_index_h, k_outliers_b,
    k_outliers_h,
    v_codes_b, v_codes_h, v_scales_b, v_scales_h, v_scales_t, v_scales_c, v_index_b, v_index_h, v_outliers_b,
    v_outliers_h,
    k_window_b, k_window_h, k_window_t, v_window_b, v_window_h, v_window_t,
    k_sinks_b, k_sinks_h, k_sinks_t, v_sinks_b, v_sinks_h, v_sinks_t,
    # Layout of packed keys and of packed values.
    K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_SEGMENT: tl.constexpr, K_WORD_BYTES: tl.constexpr,
    K_TYPE: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_SEGMENT: tl.constexpr, V_WORD_BYTES: tl.constexpr,
    V_TYPE: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    # New tokens; rows, and rows of a tile; channels; tokens of a block; tokens of a split and of a block in 16 bit.
    NEW: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    DENSE_SPLIT: tl.constexpr, DENSE_BLOCK: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Compute attention over one split of tokens, and the log2 of the sum of its exponentials."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r = tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * QUERIES + r
    q_rows, out_rows = q + row * CHANNELS, sums + (row * splits + split) * CHANNELS
    # The first visible token, and the first that is visible as it is packed.
    begin = tl.zeros((), tl.int32)
    if first_visible is not None:
        begin += tl.load(first_visible + b)
    sink_tokens = tl.maximum(tl.minimum(sink_tokens, tokens - begin), 0)
    packed_visible = begin + sink_tokens
    if split < sink_splits:
        first = split * DENSE_SPLIT
        attend_dense(
            q_rows, k_sinks + b * k_sinks_b + h * k_sinks_h, v_sinks + b * v_sinks_b + h * v_sinks_h,
            k_sinks_t, v_sinks_t, first, 0, sink_tokens + 0 * r, sink_tokens, scaling,
            out_rows, log_sums + row * splits + split, r < QUERIES, CHANNELS, DENSE_BLOCK, DENSE_SPLIT, ROWS,
        )  # fmt: skip
    elif split < sink_splits + window_splits:
        first = (split - sink_splits) * DENSE_SPLIT
        attend_dense(
            q_rows, k_window + b * k_window_b + h * k_window_h, v_window + b * v_window_b + h * v_window_h,
            k_window_t, v_window_t, first, begin - tokens, window_tokens - NEW + 1 + r % NEW, window_tokens, scaling,
            out_rows, log_sums + row * splits + split, r < QUERIES, CHANNELS, DENSE_BLOCK, DENSE_SPLIT, ROWS,
        )  # fmt: skip
    else:
        if K_OUTLIERS:
            k_index += b * k_index_b + h * k_index_h
            k_outliers += b * k_outliers_b + h * k_outliers_h
        if V_OUTLIERS:
            v_index += b * v_index_b + h * v_index_h
            v_outliers += b * v_outliers_b + h * v_outliers_h
        packed_first = packed_begin + (split - sink_splits - window_splits) * split_tokens
        # Every block has a visible token, so that a maximum of logits is finite.
        last = tl.where(packed_visible < tokens, tl.minimum(packed_first + split_tokens, tokens), 0)
        packed_first = tl.maximum(packed_first, packed_visible // BLOCK * BLOCK)
        _attend_packed(
            q_rows, out_rows, log_sums + row * splits + split, r < QUERIES,
            k_codes + b * k_codes_b + h * k_codes_h, k_scales, k_offsets, k_levels, k_index, k_outliers,
            b * k_scales_b + h * k_scales_h, k_scales_t, k_scales_c,
            v_codes + b * v_codes_b + h * v_codes_h, v_scales, v_offsets, v_levels, v_index, v_outliers,
            b * v_scales_b + h * v_scales_h, v_scales_t, v_scales_c,
            cos, sin, b * angle_b, packed_first, last, tokens, packed_visible, scaling,
            K_LOW, K_HIGH, K_SEGMENT, K_WORD_BYTES, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, K_OUTLIERS,
            V_LOW, V_HIGH, V_SEGMENT, V_WORD_BYTES, V_TYPE, V_BY_TOKEN, V_GROUP, V_ZERO, V_OUTLIERS,
            ROWS, CHANNELS, BLOCK, ASSEMBLER,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _attend_packed(  # type: ignore[no-untyped-def]
    # Queries and results of each row; rows that exist.
    q_rows, out_rows, log_sum_rows, row_mask,
    # Packed keys and values of the head; the index of its first range, strides of ranges by token and by channel.
    k_codes, k_scales, k_offsets, k_levels, k_index, k_outliers, k_range, k_scales_t, k_scales_c,
    v_codes, v_scales, v_offsets, v_levels, v_index, v_outliers, v_range, v_scales_t, v_scales_c,
    # Rotary angles, and the index of the first of the sequence.
    cos, sin, angle,
    # Packed tokens of the split, from the first of a block on; of the sequence; the first visible one.
    first, last, tokens, packed_visible, scaling,
    K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_SEGMENT: tl.constexpr, K_WORD_BYTES: tl.constexpr,
    K_TYPE: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_SEGMENT: tl.constexpr, V_WORD_BYTES: tl.constexpr,
    V_TYPE: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Compute attention over one split of packed tokens, block by block."""
    K_WORDS: tl.constexpr = K_SEGMENT // K_WORD_BYTES
    V_WORDS: tl.constexpr = V_SEGMENT // V_WORD_BYTES
    kx, vx = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)
    queries, query_sums, top = load_queries(q_rows, row_mask, kx, scaling, CHANNELS, K_SEGMENT, K_WORD_BYTES, ROWS)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = ()
    for _ in tl.static_range(CHANNELS // V_WORDS):
        acc += (tl.zeros((V_WORDS, ROWS), tl.float32),)
    # Of ranges of tokens, sums of offsets; one for each segment.
    lifts = ()
    for _ in tl.static_range(CHANNELS // V_SEGMENT):
        lifts += (tl.zeros((ROWS,), tl.float32),)

    for block in range(first, last, BLOCK):
        start = tl.multiple_of(block, BLOCK)
        n = start + tl.arange(0, BLOCK)
        here = n < tokens
        k_range_scales, k_range_offsets = load_block_ranges(
            k_scales, k_offsets, k_range, n, here, start, kx, k_scales_t, k_scales_c, CHANNELS, K_SEGMENT, K_WORD_BYTES,
            K_BY_TOKEN, K_GROUP, K_ZERO,
        )  # fmt: skip
        v_range_scales, v_range_offsets = load_block_ranges(
            v_scales, v_offsets, v_range, n, here, start, vx, v_scales_t, v_scales_c, CHANNELS, V_SEGMENT, V_WORD_BYTES,
            V_BY_TOKEN, V_GROUP, V_ZERO,
        )  # fmt: skip
        k_words = load_words(k_codes, n, here, kx, (K_LOW + K_HIGH) * CHANNELS // 8, K_WORDS, K_WORD_BYTES)
        v_words = load_words(v_codes, n, here, vx, (V_LOW + V_HIGH) * CHANNELS // 8, V_WORDS, V_WORD_BYTES)

        if cos is not None:
            logits = rotary_block_logits(
                k_words, queries, cos, sin, angle + n[:, None] * (CHANNELS // 2), k_levels, k_range_scales,
                k_range_offsets, here, kx, K_LOW, K_HIGH, CHANNELS, K_SEGMENT, K_WORD_BYTES, K_TYPE, K_BY_TOKEN,
                ASSEMBLER, BLOCK, ROWS,
            )  # fmt: skip
            logits *= top[None, :]
        else:
            logits = block_logits(
                k_words, queries, query_sums, top, k_levels, k_range_scales, k_range_offsets,
                K_LOW, K_HIGH, CHANNELS, K_SEGMENT, K_WORD_BYTES, K_TYPE, K_BY_TOKEN, ASSEMBLER, BLOCK, ROWS,
            )  # fmt: skip
        for j in tl.static_range(K_OUTLIERS):
            c = tl.load(k_index + n * K_OUTLIERS + j, here, 0).to(tl.int32)
            excess = outlier_excess(
                k_codes, k_outliers, c, j, k_levels, k_scales, k_offsets, k_range, n, here, start, k_scales_t,
                k_scales_c, K_LOW, K_HIGH, CHANNELS, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, K_OUTLIERS,
            )  # fmt: skip
            logits += excess[:, None] * query_channel(q_rows, row_mask, c, n, here, cos, sin, angle, scaling, CHANNELS)
        logits = tl.where((here & (n >= packed_visible))[:, None], logits, float("-inf"))

        if V_BY_TOKEN:
            # The running maximum is that of probabilities times scales, so these are at most 1, however large a
            # scale or small another: none overflows float16, and only what is negligible underflows.
            widest = tl.zeros((BLOCK,), tl.float32)
            for s in tl.static_range(CHANNELS // V_SEGMENT):
                widest = tl.maximum(widest, v_range_scales[s].to(tl.float32))
            peak = tl.max(logits + tl.log2(widest)[:, None], 0)
        else:
            peak = tl.max(logits, 0)
        peak = tl.maximum(m, peak)
        rescale = tl.exp2(m - peak)
        m = peak
        p = tl.exp2(logits - m[None, :])
        p_sum = tl.sum(p, 0)
        total = total * rescale + p_sum
        acc, lifts = add_values(
            v_words, acc, lifts, p, p_sum, rescale, v_levels, v_range_scales, v_range_offsets,
            V_LOW, V_HIGH, CHANNELS, V_SEGMENT, V_WORD_BYTES, V_TYPE, V_BY_TOKEN, ASSEMBLER, ROWS,
        )  # fmt: skip
        for j in tl.static_range(V_OUTLIERS):
            c = tl.load(v_index + n * V_OUTLIERS + j, here, 0).to(tl.int32)
            excess = outlier_excess(
                v_codes, v_outliers, c, j, v_levels, v_scales, v_offsets, v_range, n, here, start, v_scales_t,
                v_scales_c, V_LOW, V_HIGH, CHANNELS, V_TYPE, V_BY_TOKEN, V_GROUP, V_ZERO, V_OUTLIERS,
            )  # fmt: skip
            acc = add_channel(
                acc, p * excess[:, None], c, vx, V_LOW, CHANNELS, V_SEGMENT, V_WORD_BYTES, V_TYPE, V_BY_TOKEN
            )  # fmt: skip

    for i in tl.static_range(CHANNELS // V_WORDS):
        channel = (i // V_WORD_BYTES) * V_SEGMENT + vx * V_WORD_BYTES + i % V_WORD_BYTES
        x = acc[i]
        if V_BY_TOKEN:
            unit = unit_of(V_TYPE, i // V_WORD_BYTES, V_LOW, CHANNELS, V_SEGMENT)
            x = x * unit + lifts[i // V_WORD_BYTES][None, :]
        tl.store(out_rows[None, :] + channel[:, None], x / positive_or_one(total)[None, :], row_mask[None, :])
    tl.store(log_sum_rows, m + tl.log2(total), row_mask)
