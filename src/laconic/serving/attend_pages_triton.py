"""The kernel of attention over packed pages: some rows over one split of the tokens of a key-value head.

A *row* is one of the queries (query heads times new tokens) that share the key-value head. Within a page each part of a
token (codes, scales, outliers) lies in an array over the page's tokens (`serving.page`), so a block of tokens is read
by the functions of `kv.packed_block_triton`, with pointers into its page. Constants are those of that module and of
`kv.planes_triton`; to those of one side, which begin with K_ or V_, are added

    CODES_AT, SCALES_AT, OFFSETS_AT, INDEX_AT, OUTLIERS_AT    first byte of the array in a page; -1: not in pages
    WORD_TYPE                                                 type of a word of codes
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
from laconic.kv.splits_triton import finite_or_zero, positive_or_one


@triton.jit(do_not_specialize=["rows", "new", "table_stride"])  # type: ignore[untyped-decorator]
def attend_pages(  # type: ignore[no-untyped-def]
    # Queries (B, H, rows, C); exact keys and values of the new tokens (B, H, C), where EXACT.
    q, k_new, v_new,
    # Pages, numbers of pages (B, P), tokens of each sequence (B,); first packed token that is read (B,), of a block
    # (None: the first of all); heads of the group (None: all).
    cache, table, lengths, firsts, group_heads,
    # Static ranges (H, C) and levels of keys and of values; rotary angles of every position (None: none).
    k_static_scales, k_static_offsets, k_levels, v_static_scales, v_static_offsets, v_levels, cos, sin,
    # Results: attention (B, H, rows, splits, C), log2 of the sum of exponentials (B, H, rows, splits).
    sums, log_sums,
    # Key-value heads of the layer and of the group; rows of a head; new tokens; strides in bytes, but in numbers of
    # `table` and of sequences of queries, new keys and new values; factor of the logits (times log2 e).
    all_heads, heads, rows, new, page_stride, head_stride, table_stride, q_stride, k_stride, v_stride, scaling,
    # Packed keys and values.
    K_CODES_AT: tl.constexpr, K_SCALES_AT: tl.constexpr, K_OFFSETS_AT: tl.constexpr, K_INDEX_AT: tl.constexpr,
    K_OUTLIERS_AT: tl.constexpr, K_WORD_TYPE: tl.constexpr,
    K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_SEGMENT: tl.constexpr, K_WORD_BYTES: tl.constexpr,
    K_TYPE: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    V_CODES_AT: tl.constexpr, V_SCALES_AT: tl.constexpr, V_OFFSETS_AT: tl.constexpr, V_INDEX_AT: tl.constexpr,
    V_OUTLIERS_AT: tl.constexpr, V_WORD_TYPE: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_SEGMENT: tl.constexpr, V_WORD_BYTES: tl.constexpr,
    V_TYPE: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    # Tokens of a page and of a unit; first bytes of sinks and of recent tokens in a page, and how many there are;
    # tokens before a new one that it attends to exactly; sliding window (0: none); type of exact numbers.
    PAGE: tl.constexpr, UNIT: tl.constexpr, SINKS_AT: tl.constexpr, RECENT_AT: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, RESIDUAL: tl.constexpr, WINDOW: tl.constexpr, EXACT_TYPE: tl.constexpr,
    EXACT_ITEM: tl.constexpr,
    # Whether the last split is of exact tokens, for single new tokens; rows of a tile; channels; tokens of a block.
    EXACT: tl.constexpr, SINGLE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Compute attention over one split of tokens, and the log2 of the sum of its exponentials."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    if group_heads is not None:
        h = tl.load(group_heads + h)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row_mask = r < rows
    row = (b * all_heads + h) * rows + r
    q_rows, out_rows = q + b * q_stride + (h * rows + r) * CHANNELS, sums + (row * splits + split) * CHANNELS
    log_sum_rows = log_sums + row * splits + split
    length = tl.load(lengths + b)
    table += b * table_stride
    cache += h.to(tl.int64) * head_stride
    packed_splits = splits - 1 if EXACT else splits
    if split < packed_splits:
        position = length - new + r % new
        exact_from = tl.maximum(position - RESIDUAL, 0) // UNIT * UNIT
        # Programs divide the tokens that a row of theirs attends to, so that short texts are divided too.
        stop = tl.max(tl.where(row_mask, exact_from, 0), 0)
        begin = SINKS // BLOCK * BLOCK
        if firsts is not None:
            begin = tl.maximum(begin, tl.load(firsts + b))
        if WINDOW:
            oldest = tl.min(tl.where(row_mask, position, 2147483647), 0) + 1 - WINDOW
            begin = tl.maximum(oldest // BLOCK * BLOCK, begin)
        blocks = (tl.maximum(stop - begin, 0) + BLOCK - 1) // BLOCK
        per_split = (blocks + packed_splits - 1) // packed_splits * BLOCK
        first = begin + split * per_split
        _attend_packed(
            q_rows, row_mask, cache, table, h, position, exact_from,
            k_static_scales, k_static_offsets, k_levels, v_static_scales, v_static_offsets, v_levels, cos, sin,
            out_rows, log_sum_rows, first, tl.minimum(first + per_split, stop), stop, page_stride, scaling,
            K_CODES_AT, K_SCALES_AT, K_OFFSETS_AT, K_INDEX_AT, K_OUTLIERS_AT, K_WORD_TYPE,
            K_LOW, K_HIGH, K_SEGMENT, K_WORD_BYTES, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, K_OUTLIERS,
            V_CODES_AT, V_SCALES_AT, V_OFFSETS_AT, V_INDEX_AT, V_OUTLIERS_AT, V_WORD_TYPE,
            V_LOW, V_HIGH, V_SEGMENT, V_WORD_BYTES, V_TYPE, V_BY_TOKEN, V_GROUP, V_ZERO, V_OUTLIERS,
            PAGE, SINKS, WINDOW, EXACT_TYPE, SINGLE, ROWS, CHANNELS, BLOCK, ASSEMBLER,
        )  # fmt: skip
    elif EXACT:
        k_new += b * k_stride + h * CHANNELS
        v_new += b * v_stride + h * CHANNELS
        _attend_exact(
            q_rows, row_mask, k_new, v_new, cache, table, length - 1, page_stride, scaling,
            out_rows, log_sum_rows, PAGE, UNIT, SINKS_AT, RECENT_AT, SINKS, RECENT, RESIDUAL, WINDOW, EXACT_TYPE,
            EXACT_ITEM, ROWS, CHANNELS, EXACT_BLOCK,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _in_page(page, AT: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a pointer to the array of a page that begins at byte AT."""
    return (page + AT).to(tl.pointer_type(TYPE))


@triton.jit  # type: ignore[untyped-decorator]
def _attend_exact(  # type: ignore[no-untyped-def]
    q_rows, row_mask, k_own, v_own, cache, table, position, page_stride, scaling, out_rows, log_sum_rows,
    PAGE: tl.constexpr, UNIT: tl.constexpr, SINKS_AT: tl.constexpr, RECENT_AT: tl.constexpr, SINKS: tl.constexpr,
    RECENT: tl.constexpr, RESIDUAL: tl.constexpr, WINDOW: tl.constexpr, EXACT_TYPE: tl.constexpr,
    EXACT_ITEM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute attention of a single new token over itself, the exact recent tokens before it, and the sinks."""
    c = tl.arange(0, CHANNELS)
    query = tl.load(q_rows[None, :] + c[:, None], row_mask[None, :], 0.0)
    own = tl.load(k_own + c)
    m = tl.sum(query.to(tl.float32) * own.to(tl.float32)[:, None], 0) * scaling
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((CHANNELS, ROWS), tl.float32) + tl.load(v_own + c).to(tl.float32)[:, None]
    query = query.to(EXACT_TYPE)
    exact_from = tl.maximum(position - RESIDUAL, 0) // UNIT * UNIT
    sinks = tl.minimum(exact_from, SINKS)
    EXACT_BYTES: tl.constexpr = 2 * CHANNELS * EXACT_ITEM
    for start in range(0, sinks + position - exact_from, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.where(i < sinks, i, exact_from + i - sinks)
        here = n < position
        if WINDOW:
            here &= position - n < WINDOW
        number = tl.load(table + n // PAGE, here, 0).to(tl.int64)
        at = tl.where(
            i < sinks, SINKS_AT + i * EXACT_BYTES, RECENT_AT + n % PAGE % (RECENT if RECENT else 1) * EXACT_BYTES
        )
        token = (cache + number * page_stride + at).to(tl.pointer_type(EXACT_TYPE))
        keys = tl.load(token[:, None] + c[None, :], here[:, None], 0.0)
        values = tl.load(token[:, None] + CHANNELS + c[None, :], here[:, None], 0.0)
        logits = tl.dot(keys, query, input_precision="ieee") * scaling
        logits = tl.where(here[:, None], logits, float("-inf"))
        peak = tl.maximum(m, tl.max(logits, 0))
        rescale = tl.exp2(m - peak)
        m = peak
        p = tl.exp2(logits - m[None, :])
        total = total * rescale + tl.sum(p, 0)
        acc = tl.dot(tl.trans(values), p.to(EXACT_TYPE), acc * rescale[None, :], input_precision="ieee")
    tl.store(out_rows[None, :] + c[:, None], acc / total[None, :], row_mask[None, :])
    tl.store(log_sum_rows, m + tl.log2(total), row_mask)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_packed(  # type: ignore[no-untyped-def]
    # Queries, and rows that exist; pages of the head, numbers of the sequence's pages; number of the head; of each row
    # its position and the first token that it attends to exactly.
    q_rows, row_mask, cache, table, h, position, exact_from,
    k_static_scales, k_static_offsets, k_levels, v_static_scales, v_static_offsets, v_levels, cos, sin,
    # Results of each row; tokens of the split, from the first of a block on; tokens that are packed for some row.
    out_rows, log_sum_rows, first, last, stop, page_stride, scaling,
    K_CODES_AT: tl.constexpr, K_SCALES_AT: tl.constexpr, K_OFFSETS_AT: tl.constexpr, K_INDEX_AT: tl.constexpr,
    K_OUTLIERS_AT: tl.constexpr, K_WORD_TYPE: tl.constexpr,
    K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_SEGMENT: tl.constexpr, K_WORD_BYTES: tl.constexpr,
    K_TYPE: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    K_OUTLIERS: tl.constexpr,
    V_CODES_AT: tl.constexpr, V_SCALES_AT: tl.constexpr, V_OFFSETS_AT: tl.constexpr, V_INDEX_AT: tl.constexpr,
    V_OUTLIERS_AT: tl.constexpr, V_WORD_TYPE: tl.constexpr,
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_SEGMENT: tl.constexpr, V_WORD_BYTES: tl.constexpr,
    V_TYPE: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    V_OUTLIERS: tl.constexpr,
    PAGE: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, EXACT_TYPE: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """Compute attention over one split of packed tokens, block by block."""
    K_WORDS: tl.constexpr = K_SEGMENT // K_WORD_BYTES
    V_WORDS: tl.constexpr = V_SEGMENT // V_WORD_BYTES
    K_RANGES: tl.constexpr = CHANNELS // K_GROUP if K_BY_TOKEN else CHANNELS
    V_RANGES: tl.constexpr = CHANNELS // V_GROUP if V_BY_TOKEN else CHANNELS
    kx, vx = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)
    queries, query_sums, top = load_queries(q_rows, row_mask, kx, scaling, CHANNELS, K_SEGMENT, K_WORD_BYTES, ROWS)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = ()
    for _ in tl.static_range(CHANNELS // V_WORDS):
        acc += (tl.zeros((V_WORDS, ROWS), tl.float32),)
    lifts = ()
    for _ in tl.static_range(CHANNELS // V_SEGMENT):
        lifts += (tl.zeros((ROWS,), tl.float32),)

    # The next page is looked up a block ahead: its address takes as long to load as a block.
    next_number = tl.load(table + first // PAGE, first < last, 0).to(tl.int64)
    for block in range(first, last, BLOCK):
        block_start = tl.multiple_of(block, BLOCK)
        start = tl.multiple_of(block_start % PAGE, BLOCK)
        page = tl.multiple_of(cache + next_number * page_stride, 16)
        next_number = tl.load(table + (block_start + BLOCK) // PAGE, block_start + BLOCK < last, 0).to(tl.int64)
        n = start + tl.arange(0, BLOCK)
        everywhere = block_start + tl.arange(0, BLOCK)
        here = everywhere < stop

        k_codes = _in_page(page, K_CODES_AT, K_WORD_TYPE)
        k_scales, k_offsets, k_range = k_static_scales, k_static_offsets, h * CHANNELS
        if K_SCALES_AT >= 0:
            k_scales, k_range = _in_page(page, K_SCALES_AT, tl.float16), 0
        if K_OFFSETS_AT >= 0:
            k_offsets = _in_page(page, K_OFFSETS_AT, tl.float16)
        K_STRIDE: tl.constexpr = K_RANGES if K_SCALES_AT >= 0 else 0
        v_codes = _in_page(page, V_CODES_AT, V_WORD_TYPE)
        v_scales, v_offsets, v_range = v_static_scales, v_static_offsets, h * CHANNELS
        if V_SCALES_AT >= 0:
            v_scales, v_range = _in_page(page, V_SCALES_AT, tl.float16), 0
        if V_OFFSETS_AT >= 0:
            v_offsets = _in_page(page, V_OFFSETS_AT, tl.float16)
        V_STRIDE: tl.constexpr = V_RANGES if V_SCALES_AT >= 0 else 0

        k_range_scales, k_range_offsets = load_block_ranges(
            k_scales, k_offsets, k_range, n, here, start, kx, K_STRIDE, 1, CHANNELS, K_SEGMENT, K_WORD_BYTES,
            K_BY_TOKEN, K_GROUP, K_ZERO,
        )  # fmt: skip
        v_range_scales, v_range_offsets = load_block_ranges(
            v_scales, v_offsets, v_range, n, here, start, vx, V_STRIDE, 1, CHANNELS, V_SEGMENT, V_WORD_BYTES,
            V_BY_TOKEN, V_GROUP, V_ZERO,
        )  # fmt: skip
        k_words = load_words(k_codes, n, here, kx, (K_LOW + K_HIGH) * CHANNELS // 8, K_WORDS, K_WORD_BYTES)
        v_words = load_words(v_codes, n, here, vx, (V_LOW + V_HIGH) * CHANNELS // 8, V_WORDS, V_WORD_BYTES)
        if cos is not None:
            logits = rotary_block_logits(
                k_words, queries, cos, sin, everywhere[:, None] * (CHANNELS // 2), k_levels, k_range_scales,
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
            c = tl.load(_in_page(page, K_INDEX_AT, tl.uint8) + n * K_OUTLIERS + j, here, 0).to(tl.int32)
            excess = outlier_excess(
                k_codes, _in_page(page, K_OUTLIERS_AT, EXACT_TYPE), c, j, k_levels, k_scales, k_offsets, k_range, n,
                here, start, K_STRIDE, 1, K_LOW, K_HIGH, CHANNELS, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, K_OUTLIERS,
            )  # fmt: skip
            angle = (block_start - start) * (CHANNELS // 2)
            logits += excess[:, None] * query_channel(q_rows, row_mask, c, n, here, cos, sin, angle, scaling, CHANNELS)
        if SINGLE:
            visible = (here & (everywhere >= SINKS))[:, None]
        else:
            visible = (everywhere >= SINKS)[:, None] & (everywhere[:, None] < exact_from[None, :])
        if WINDOW:
            visible = visible & (position[None, :] - everywhere[:, None] < WINDOW)
        logits = tl.where(visible, logits, float("-inf"))

        if V_BY_TOKEN:
            # As in `kv.attend_packed_triton`: the maximum is that of probabilities times scales.
            widest = tl.zeros((BLOCK,), tl.float32)
            for s in tl.static_range(CHANNELS // V_SEGMENT):
                widest = tl.maximum(widest, v_range_scales[s].to(tl.float32))
            peak = tl.max(logits + tl.log2(widest)[:, None], 0)
        else:
            peak = tl.max(logits, 0)
        peak = tl.maximum(m, peak)
        finite_peak = finite_or_zero(peak)
        rescale = tl.exp2(m - finite_peak)
        m = peak
        p = tl.exp2(logits - finite_peak[None, :])
        p_sum = tl.sum(p, 0)
        total = total * rescale + p_sum
        acc, lifts = add_values(
            v_words, acc, lifts, p, p_sum, rescale, v_levels, v_range_scales, v_range_offsets,
            V_LOW, V_HIGH, CHANNELS, V_SEGMENT, V_WORD_BYTES, V_TYPE, V_BY_TOKEN, ASSEMBLER, ROWS,
        )  # fmt: skip
        for j in tl.static_range(V_OUTLIERS):
            c = tl.load(_in_page(page, V_INDEX_AT, tl.uint8) + n * V_OUTLIERS + j, here, 0).to(tl.int32)
            excess = outlier_excess(
                v_codes, _in_page(page, V_OUTLIERS_AT, EXACT_TYPE), c, j, v_levels, v_scales, v_offsets, v_range, n,
                here, start, V_STRIDE, 1, V_LOW, V_HIGH, CHANNELS, V_TYPE, V_BY_TOKEN, V_GROUP, V_ZERO, V_OUTLIERS,
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
