"""Attention over the packed history in pages, on a GPU: flash-decoding that reads codes and ranges by block table.

`serving.paged_attention` merges the result with a token's own unit and a text's exact first tokens. Codes enter tensor
cores as the small integers they are, a *field* at a time: neighbouring channels that lie in one field of neighbouring
bytes. Ranges are multiplied into queries, logits, probabilities or sums, whichever are fewest.

Axes: B sequences, H key-value heads, R query heads that share one, N new tokens, C channels, P pages, X bytes. In the
kernel a *row* is one of the R N queries of a key-value head, and a tile is (rows or tokens, channels of a field).
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.planes import field_size, plane_widths
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("attention over packed pages on a GPU needs Triton: pip install triton") from e

from laconic.kv.splits_triton import LaunchConfig

# Rows of a program.
_ROWS = 16


def default_launch(*formats: KvFormat) -> LaunchConfig:
    """Return the launch that was fastest on an H100, of 2 bits and of 4 (benchmarks/kv_paged.py --tune).

    Args:
        *formats: Formats of keys and values; the one with most bits decides.
    """
    two_bits = max(fmt.num_bits for fmt in formats) <= 2
    return LaunchConfig(64, warps=2, stages=3) if two_bits else LaunchConfig(32, warps=1, stages=3)


def paged_history(
    layer: PagedLayer,
    cache: Tensor,
    batch: SequenceBatch,
    q_BHRNC: Tensor,
    scoring: Scoring,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of new tokens over the encoded tokens before their units, sinks left out.

    Args:
        layer: Layout of the pages, which `kernel_reads_pages`.
        cache: Pages, (pages, H, tokens of a page, X) uint8; strides and the bytes of fields are even.
        batch: The sequences.
        q_BHRNC: Queries, float32, rotated as keys are.
        scoring: Settings of the scores.
        splits: Runs of tokens of a head that are programs of their own; as many as fill a GPU if None.

    Returns:
        The attention (B, H, R, N, C), and the log of the sum of its exponentials (B, H, R, N, 1); zero and -inf over
        no tokens.
    """
    B, H, R, N, C = q_BHRNC.shape
    keys, values = layer.groups[0].keys, layer.groups[0].values
    launch = default_launch(keys, values)
    rows = R * N
    chunks = triton.cdiv(rows, _ROWS)
    if splits is None:
        is_gpu = q_BHRNC.is_cuda
        processors = torch.cuda.get_device_properties(q_BHRNC.device).multi_processor_count if is_gpu else 1
        splits = triton.cdiv(launch.programs * processors, B * H * chunks)
    # Tokens of a block share the range of a channel, where groups of tokens are large enough.
    groups = [size & -size for fmt in (keys, values) if fmt.axis == "channel" and (size := fmt.group_size)]
    block = min([launch.block_tokens, *(g for g in groups if g >= 16)])
    blocks = max(1, triton.cdiv(batch.longest, block))
    run = triton.cdiv(blocks, min(splits, blocks)) * block
    runs = triton.cdiv(blocks * block, run)
    sums = torch.empty(B, H, R, N, runs, C, device=q_BHRNC.device)
    log_sums = torch.empty(B, H, R, N, runs, device=q_BHRNC.device)
    q, table, lengths = q_BHRNC.contiguous(), batch.table_BP.int().contiguous(), batch.lengths_B.int().contiguous()
    with torch.cuda.device_of(q):
        _attend_pages[(runs, B * H, chunks)](
            q, cache, table, lengths, sums, log_sums, H, rows, N, runs, run, scoring.scale,
            cache.stride(0), cache.stride(1), cache.stride(2), table.stride(0), cache.shape[2],
            *_side_constants(layer, "keys", keys), *_side_constants(layer, "values", values),
            K_FIELD=field_size(C, keys.num_bits), V_FIELD=field_size(C, values.num_bits),
            SLOT=layer.slot_bytes, TAIL_WIDTH=max(1, layer.tail_width), SHARED_AT=layer.shared_at,
            SHARED=layer.shared_bytes, UNIT=layer.unit, SINKS=layer.sinks,
            WINDOW=scoring.window or 0, CHANNELS=C, BLOCK=block, ROWS=_ROWS,
            # The interpreter is compared with the reference at a smaller tolerance.
            HALF=tl.float16 if q.is_cuda else tl.float32, BRAIN=tl.bfloat16 if q.is_cuda else tl.float32,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    log_sum = log_sums.logsumexp(-1, keepdim=True)
    shares = torch.exp(log_sums - log_sum.masked_fill(log_sum == -torch.inf, 0))
    return (sums * shares[..., None]).sum(-2), log_sum


def _side_constants(layer: PagedLayer, side: str, fmt: KvFormat) -> tuple[int, ...]:
    """Return the K_ or V_ constants of the kernel, in the order of its parameters."""
    layout = layer.layouts[0]
    start = {f.name: f.start for f in (*layout.fields, *layout.shared) if f.side == side}
    widths = plane_widths(fmt.num_bits)
    zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric else 0
    ranges = start["scale"], start.get("offset", -1), int(fmt.axis == "token"), fmt.group_size or 0
    return widths[0], sum(widths[1:]), start["codes"], *ranges, zero


# Parameters of the kernel and its parts that have the same meaning everywhere; of keys they begin with K_, of values
# with V_:
#   LOW, HIGH          bits of the first and of the second bit plane (0: none)
#   CODES              byte of a slot at which codes begin
#   SCALE, OFFSET      byte at which scales and offsets begin (-1: none): of a slot for ranges of tokens, of what a unit
#                      shares for ranges of channels
#   BY_TOKEN, GROUP    whether ranges are of tokens, and how many numbers share one
#   ZERO               code of zero
#   FIELD              channels of a field
#   SLOT, TAIL_WIDTH   bytes of a slot, and of the tail in each row of a page
#   SHARED_AT, SHARED  byte of the tail at which shared ranges begin, and bytes of those of one unit
#   UNIT               tokens of a unit


@triton.jit
def _load_half(address, mask):  # type: ignore[no-untyped-def]
    """Load float16 numbers from byte addresses, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.float16)), mask, 0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _load_tail(page, byte, row_stride, mask, SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load float16 numbers from bytes of a page's tail."""
    return _load_half(page + byte // TAIL_WIDTH * row_stride + SLOT + byte % TAIL_WIDTH, mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load_plane(plane, mask, x, CHANNELS: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the bytes of a bit plane, in tiles (tokens, FIELD)."""
    tiles = ()
    for i in tl.static_range(CHANNELS * BITS // 8 // FIELD):
        tiles += (tl.load(plane + i * FIELD + x[None, :], mask, 0),)
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    low, high, J: tl.constexpr, CHANNELS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FIELD: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Unpack the codes of the channels of field J, (tokens, FIELD), from the tiles of both planes."""
    low_bytes: tl.constexpr = CHANNELS * LOW // 8
    codes = (low[J * FIELD % low_bytes // FIELD] >> (J * FIELD // low_bytes * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        high_bytes: tl.constexpr = CHANNELS * HIGH // 8
        bits = (high[J * FIELD % high_bytes // FIELD] >> (J * FIELD // high_bytes * HIGH)) & ((1 << HIGH) - 1)
        codes += bits << LOW
    return codes.to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _channel_ranges(  # type: ignore[no-untyped-def]
    page, slot, c, row_stride, SCALE: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Load scales and offsets of channels c that all tokens of a block share; `slot` is that of its first token."""
    byte = SHARED_AT + slot // UNIT * SHARED + slot % UNIT // GROUP * (CHANNELS * 2) + c * 2
    mask = c < CHANNELS
    scale = _load_tail(page, byte + SCALE, row_stride, mask, SLOT, TAIL_WIDTH)
    if OFFSET >= 0:
        return scale, _load_tail(page, byte + OFFSET, row_stride, mask, SLOT, TAIL_WIDTH)
    return scale, -ZERO * scale


@triton.jit  # type: ignore[untyped-decorator]
def _token_ranges(  # type: ignore[no-untyped-def]
    slots, mask, G: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr
):
    """Load scales and offsets of tokens that all channels of group G share."""
    scale = _load_half(slots + SCALE + G * 2, mask)
    if OFFSET >= 0:
        return scale, _load_half(slots + OFFSET + G * 2, mask)
    return scale, -ZERO * scale


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    codes, slots, page, slot, mask, c, row_stride, SCALE: tl.constexpr, OFFSET: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr, SHARED_AT: tl.constexpr,
    SHARED: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Decode codes of channels c, where a tile has more than one range: (tokens, FIELD) float32."""
    mask = mask[:, None]
    if BY_TOKEN:
        address = slots[:, None] + (SCALE + c // GROUP * 2)[None, :]
        scale = _load_half(address, mask)
        if OFFSET >= 0:
            return codes * scale + _load_half(address + (OFFSET - SCALE), mask)
    else:
        byte = (SHARED_AT + slot // UNIT * SHARED + slot % UNIT // GROUP * (CHANNELS * 2))[:, None] + (c * 2)[None, :]
        scale = _load_tail(page[:, None], byte + SCALE, row_stride, mask, SLOT, TAIL_WIDTH)
        if OFFSET >= 0:
            return codes * scale + _load_tail(page[:, None], byte + OFFSET, row_stride, mask, SLOT, TAIL_WIDTH)
    return (codes - ZERO) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _load_queries(  # type: ignore[no-untyped-def]
    q, row, mask, x, scaling, CHANNELS: tl.constexpr, FIELD: tl.constexpr, ROWS: tl.constexpr
):
    """Load scaled queries as tiles (rows, FIELD) of size at most 1; return tiles, their sums, and their factor.

    Thus no scale of a key lifts a query above float16's range.
    """
    top = tl.zeros((ROWS,), tl.float32)
    loaded = ()
    for j in tl.static_range(CHANNELS // FIELD):
        tile = tl.load(q + row[:, None] * CHANNELS + (j * FIELD + x)[None, :], mask[:, None], 0.0) * scaling
        top = tl.maximum(top, tl.max(tl.abs(tile), 1))
        loaded += (tile,)
    top = tl.where(top > 0, top, 1.0)
    tiles = ()
    sums = ()
    for j in tl.static_range(CHANNELS // FIELD):
        tiles += (loaded[j] / top[:, None],)
        sums += (tl.sum(loaded[j] / top[:, None], 1),)
    return tiles, sums, top


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    queries, query_sums, top, low, high, x, slots, page, slot, stored, first_page, first_slot, row_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, FIELD: tl.constexpr, SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr,
    SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Compute the scores of a block, (rows, tokens)."""
    BLOCK_SHARES: tl.constexpr = not BY_TOKEN and GROUP % BLOCK == 0
    scores = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in tl.static_range(CHANNELS // FIELD):
        if BLOCK_SHARES:
            scale, offset = _channel_ranges(
                first_page, first_slot, j * FIELD + x, row_stride, SCALE, OFFSET, GROUP, ZERO,
                SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS,
            )  # fmt: skip
            codes = _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, HALF)
            scores = tl.dot((queries[j] * scale[None, :]).to(HALF), tl.trans(codes), scores)
            scores += tl.sum(queries[j] * offset[None, :], 1)[:, None]
        elif BY_TOKEN and GROUP % FIELD == 0:
            scale, offset = _token_ranges(slots, stored, j * FIELD // GROUP, SCALE, OFFSET, ZERO)
            codes = _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, HALF)
            product = tl.dot(queries[j].to(HALF), tl.trans(codes))
            scores += product * scale[None, :] + query_sums[j][:, None] * offset[None, :]
        else:
            keys = _decode(
                _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, tl.float32),
                slots, page, slot, stored, j * FIELD + x,
                row_stride, SCALE, OFFSET, BY_TOKEN, GROUP, ZERO,
                SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS,
            )  # fmt: skip
            scores = tl.dot(queries[j], tl.trans(keys), scores, input_precision="tf32")
    scores *= top[:, None]
    return scores


@triton.jit  # type: ignore[untyped-decorator]
def _add_values(  # type: ignore[no-untyped-def]
    acc, p, p_sum, rescale, low, high, x, slots, page, slot, stored, first_page, first_slot, row_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, FIELD: tl.constexpr, SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr,
    SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, BRAIN: tl.constexpr,
):  # fmt: skip
    """Rescale the sums so far, and add the values of a block, weighted by p (rows, tokens)."""
    BLOCK_SHARES: tl.constexpr = not BY_TOKEN and GROUP % BLOCK == 0
    next_acc = ()
    for j in tl.static_range(CHANNELS // FIELD):
        rescaled = acc[j] * rescale[:, None]
        if BLOCK_SHARES:
            scale, offset = _channel_ranges(
                first_page, first_slot, j * FIELD + x, row_stride, SCALE, OFFSET, GROUP, ZERO,
                SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS,
            )  # fmt: skip
            product = tl.dot(p.to(HALF), _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, HALF))
            next_acc += (rescaled + product * scale[None, :] + p_sum[:, None] * offset[None, :],)
        elif BY_TOKEN and GROUP % FIELD == 0:
            scale, offset = _token_ranges(slots, stored, j * FIELD // GROUP, SCALE, OFFSET, ZERO)
            rescaled += tl.sum(p * offset[None, :], 1)[:, None]
            # Scales may be of any size, so probabilities times scales need bfloat16's range.
            codes = _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, BRAIN)
            next_acc += (tl.dot((p * scale[None, :]).to(BRAIN), codes, rescaled),)
        else:
            values = _decode(
                _unpack(low, high, j, CHANNELS, LOW, HIGH, FIELD, tl.float32),
                slots, page, slot, stored, j * FIELD + x,
                row_stride, SCALE, OFFSET, BY_TOKEN, GROUP, ZERO,
                SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS,
            )  # fmt: skip
            next_acc += (tl.dot(p, values, rescaled, input_precision="tf32"),)
    return next_acc


@triton.jit(do_not_specialize=["rows", "new", "runs", "run"])  # type: ignore[untyped-decorator]
def _attend_pages(  # type: ignore[no-untyped-def]
    # Queries (B, H, rows, channels), pages, numbers of pages (B, P), lengths (B,); results of each run.
    q, cache, table, lengths, sums, log_sums,
    # Key-value heads; rows of a head; new tokens; runs of tokens; tokens of a run; factor of the logits.
    heads, rows, new, runs, run, scaling,
    # Strides in bytes (of `table` in numbers), and tokens of a page.
    page_stride, head_stride, row_stride, table_stride, page_tokens,
    # Keys.
    K_LOW: tl.constexpr, K_HIGH: tl.constexpr, K_CODES: tl.constexpr, K_SCALE: tl.constexpr, K_OFFSET: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    # Values.
    V_LOW: tl.constexpr, V_HIGH: tl.constexpr, V_CODES: tl.constexpr, V_SCALE: tl.constexpr, V_OFFSET: tl.constexpr,
    V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    K_FIELD: tl.constexpr, V_FIELD: tl.constexpr,
    # Layout of a page.
    SLOT: tl.constexpr, TAIL_WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    # First tokens left out; sliding window (0: none).
    SINKS: tl.constexpr, WINDOW: tl.constexpr,
    # Sizes: channels of a head, tokens of a block, rows of a program; dtypes of products.
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr,
):  # fmt: skip
    """Compute the attention of some rows over one run of tokens, and the log of the sum of its exponentials."""
    split = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    kx, vx = tl.arange(0, K_FIELD), tl.arange(0, V_FIELD)
    length = tl.load(lengths + b)
    stop = length // UNIT * UNIT
    position = length - new + r % new
    unit_start = position // UNIT * UNIT
    row = tl.program_id(1).to(tl.int64) * rows + r
    queries, query_sums, top = _load_queries(q, row, r < rows, kx, scaling, CHANNELS, K_FIELD, ROWS)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = ()
    for _ in tl.static_range(CHANNELS // V_FIELD):
        acc += (tl.zeros((ROWS, V_FIELD), tl.float32),)

    first = split * run
    for start in range(first, tl.minimum(first + run, stop), BLOCK):
        n = start + tl.arange(0, BLOCK)
        stored = n < stop
        number = tl.load(table + b * table_stride + n // page_tokens, stored, 0).to(tl.int64)
        slot = n % page_tokens
        page = cache + number * page_stride + h * head_stride
        slots = page + slot * row_stride
        first_number = tl.load(table + b * table_stride + start // page_tokens).to(tl.int64)
        first_page = cache + first_number * page_stride + h * head_stride
        first_slot = start % page_tokens
        k_low = _load_plane(slots[:, None] + K_CODES, stored[:, None], kx, CHANNELS, K_LOW, K_FIELD)
        k_high = _load_plane(
            slots[:, None] + K_CODES + CHANNELS * K_LOW // 8, stored[:, None], kx, CHANNELS, K_HIGH, K_FIELD
        )
        v_low = _load_plane(slots[:, None] + V_CODES, stored[:, None], vx, CHANNELS, V_LOW, V_FIELD)
        v_high = _load_plane(
            slots[:, None] + V_CODES + CHANNELS * V_LOW // 8, stored[:, None], vx, CHANNELS, V_HIGH, V_FIELD
        )

        scores = _scores(
            queries, query_sums, top, k_low, k_high, kx, slots, page, slot, stored, first_page, first_slot, row_stride,
            K_LOW, K_HIGH, K_SCALE, K_OFFSET, K_BY_TOKEN, K_GROUP, K_ZERO, K_FIELD,
            SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS, BLOCK, ROWS, HALF,
        )  # fmt: skip
        visible = (n[None, :] >= SINKS) & (n[None, :] < unit_start[:, None])
        if WINDOW:
            visible &= position[:, None] - n[None, :] < WINDOW
        scores = tl.where(visible, scores, float("-inf"))

        peak = tl.maximum(m, tl.max(scores, 1))
        finite_peak = tl.where(peak == float("-inf"), 0.0, peak)
        rescale = tl.exp(m - finite_peak)
        m = peak
        p = tl.exp(scores - finite_peak[:, None])
        p_sum = tl.sum(p, 1)
        total = total * rescale + p_sum

        acc = _add_values(
            acc, p, p_sum, rescale, v_low, v_high, vx, slots, page, slot, stored, first_page, first_slot, row_stride,
            V_LOW, V_HIGH, V_SCALE, V_OFFSET, V_BY_TOKEN, V_GROUP, V_ZERO, V_FIELD,
            SLOT, TAIL_WIDTH, SHARED_AT, SHARED, UNIT, CHANNELS, BLOCK, HALF, BRAIN,
        )  # fmt: skip
    out = row * runs + split
    for j in tl.static_range(CHANNELS // V_FIELD):
        x = acc[j] / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(sums + out[:, None] * CHANNELS + (j * V_FIELD + vx)[None, :], x, (r < rows)[:, None])
    tl.store(log_sums + out, m + tl.log(total), r < rows)
