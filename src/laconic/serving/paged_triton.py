"""Attention over the packed history in pages, on a GPU: flash-decoding that reads codes and ranges by block table.

What a page holds is `serving.paged`'s affair: it gives strides and places of bytes, and joins what comes out with a
token's own unit and a text's exact first tokens. Codes enter tensor cores as the whole numbers they are, a run of
neighbouring channels at a time that lie in one field of neighbouring bytes; ranges go into queries, logits,
probabilities or sums, whichever they are fewest of.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.planes import planes

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("attention over packed pages on a GPU needs Triton: pip install triton") from e

_ROWS = 16


@dataclass(frozen=True)
class Cut:
    """tokens: of a block. warps: of a program. programs: how many each multiprocessor should get."""

    tokens: int
    warps: int
    programs: int = 16


@dataclass(frozen=True)
class Side:
    """Where keys, or values, lie: the byte of codes in a slot, and of scale and offset (-1: none), in the slot for
    ranges of a token, and in what a unit shares for those of channels."""

    fmt: KvFormat
    codes: int
    scale: int
    offset: int

    def constants(self) -> tuple[int, ...]:
        """In the order of the kernel's parameters."""
        fmt = self.fmt
        widths = _widths(fmt)
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric else 0
        by_token = int(fmt.axis == "token")
        return widths[0], sum(widths[1:]), self.codes, self.scale, self.offset, by_token, fmt.group_size or 0, zero


def _widths(fmt: KvFormat) -> list[int]:
    return [8] if fmt.num_bits == 8 else [width for width, _ in planes(fmt.num_bits)]


def _together(fmt: KvFormat, channels: int) -> int:
    """How many neighbouring channels lie in one field of neighbouring bytes of every plane."""
    return channels * min(_widths(fmt)) // 8


def fits_pages(fmt: KvFormat, channels: int) -> bool:
    """Whether the kernel reads this format: whole codes of 2, 3, 4 or 8 bits with ranges of their own, of heads of so
    many channels that a product has at least 16 on a side."""
    plain = fmt.datatype == "int" and not fmt.outlier_ratio and fmt.group_size is not None
    return plain and fmt.num_bits in (2, 3, 4, 8) and not channels & (channels - 1) and _together(fmt, channels) >= 16


def best_cut(keys: Side, values: Side) -> Cut:
    """What was fastest on an H100, of 2 bits and of 4 (benchmarks/kv_paged.py --tune)."""
    return Cut(64, 2) if max(keys.fmt.num_bits, values.fmt.num_bits) <= 2 else Cut(32, 1)


def paged_history(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    longest: int,
    keys: Side,
    values: Side,
    *,
    scale: float,
    slot: int,
    width: int,
    shared_at: int,
    shared: int,
    unit: int,
    sinks: int,
    window: int | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over the stored ones before their units, the first `sinks` left out.

    q: (sequences, heads, queries a head, new tokens, channels) float32. cache: (pages, heads, tokens a page, bytes)
    uint8. table: (sequences, pages). lengths: (sequences,), the new tokens included; longest: the largest, or more.
    slot, width: bytes of a slot, and of a row's part of the tail; shared_at: where in a tail units' ranges begin, each
    of `shared` bytes. All strides and places are even. splits: runs of tokens of a head; as many as fill a GPU if None.
    Returns: the attention, as q, and the log of the sum of its exponentials, (..., 1); zero and -inf over nothing.
    """
    batch, heads, each, new, D = q.shape
    cut = best_cut(keys, values)
    rows = each * new
    chunks = triton.cdiv(rows, _ROWS)
    if splits is None:
        busy = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = triton.cdiv(cut.programs * busy, batch * heads * chunks)
    # A block of tokens has one range of each channel, where these are of enough tokens.
    groups = [size & -size for f in (keys, values) if f.fmt.axis == "channel" and (size := f.fmt.group_size)]
    block = min([cut.tokens, *(g for g in groups if g >= 16)])
    blocks = max(1, triton.cdiv(longest, block))
    run = triton.cdiv(blocks, min(splits, blocks)) * block
    runs = triton.cdiv(blocks * block, run)
    sums = torch.empty(batch, heads, each, new, runs, D, device=q.device)
    weights = torch.empty(batch, heads, each, new, runs, device=q.device)
    q, table, lengths = q.contiguous(), table.int().contiguous(), lengths.int().contiguous()
    with torch.cuda.device_of(q):
        _history[(runs, batch * heads, chunks)](
            q, cache, table, lengths, sums, weights, heads, rows, new, runs, run, scale,
            cache.stride(0), cache.stride(1), cache.stride(2), table.stride(0), cache.shape[2],
            *keys.constants(), *values.constants(),
            KX=_together(keys.fmt, D), VX=_together(values.fmt, D),
            SLOT=slot, WIDTH=max(1, width), SHARED_AT=shared_at, SHARED=shared, UNIT=unit, SINKS=sinks,
            WINDOW=window or 0, D=D, N=block, ROWS=_ROWS,
            # The interpreter is held to the reference more closely.
            HALF=tl.float16 if q.is_cuda else tl.float32, BRAIN=tl.bfloat16 if q.is_cuda else tl.float32,
            num_warps=cut.warps,
        )  # fmt: skip
    whole = weights.logsumexp(-1, keepdim=True)
    shares = torch.exp(weights - whole.masked_fill(whole == -torch.inf, 0))
    return (sums * shares[..., None]).sum(-2), whole


@triton.jit
def _half(at, here):  # type: ignore[no-untyped-def]
    """Float16 numbers at bytes, in float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), here, 0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _tail(page, t, row_bytes, here, SLOT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float16 at byte t of a page's tail."""
    return _half(page + t // WIDTH * row_bytes + SLOT + t % WIDTH, here)


@triton.jit  # type: ignore[untyped-decorator]
def _plane(row, here, x, D: tl.constexpr, BITS: tl.constexpr, X: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bytes of a plane, in tiles (tokens, X)."""
    tiles = ()
    for o in tl.static_range(D * BITS // 8 // X):
        tiles += (tl.load(row + o * X + x[None, :], here, 0),)
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _codes(  # type: ignore[no-untyped-def]
    first, second, J: tl.constexpr, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, X: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Codes of channels J X and on, (tokens, X)."""
    per_first: tl.constexpr = D * W0 // 8
    codes = (first[J * X % per_first // X] >> (J * X // per_first * W0)) & ((1 << W0) - 1)
    if W1:
        per_second: tl.constexpr = D * W1 // 8
        more = (second[J * X % per_second // X] >> (J * X // per_second * W1)) & ((1 << W1) - 1)
        codes += more << W0
    return codes.to(TYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _of_block(  # type: ignore[no-untyped-def]
    page, place, c, row_bytes, SCALE: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Scales and offsets of channels c, which the tokens from `place` on share."""
    t = SHARED_AT + place // UNIT * SHARED + place % UNIT // GROUP * (D * 2) + c * 2
    here = c < D
    scale = _tail(page, t + SCALE, row_bytes, here, SLOT, WIDTH)
    if OFFSET >= 0:
        return scale, _tail(page, t + OFFSET, row_bytes, here, SLOT, WIDTH)
    return scale, -ZERO * scale


@triton.jit  # type: ignore[untyped-decorator]
def _of_tokens(row, here, G: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales and offsets of tokens, for their channels of group G."""
    scale = _half(row + SCALE + G * 2, here)
    if OFFSET >= 0:
        return scale, _half(row + OFFSET + G * 2, here)
    return scale, -ZERO * scale


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(  # type: ignore[no-untyped-def]
    codes, row, page, place, here, c, row_bytes, SCALE: tl.constexpr, OFFSET: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr, SHARED_AT: tl.constexpr,
    SHARED: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Codes of channels c as numbers, each by its own range: where ranges are of few channels, or of few tokens."""
    here = here[:, None]
    if BY_TOKEN:
        at = row[:, None] + (SCALE + c // GROUP * 2)[None, :]
        scale = _half(at, here)
        if OFFSET >= 0:
            return codes * scale + _half(at + (OFFSET - SCALE), here)
    else:
        t = (SHARED_AT + place // UNIT * SHARED + place % UNIT // GROUP * (D * 2))[:, None] + (c * 2)[None, :]
        scale = _tail(page[:, None], t + SCALE, row_bytes, here, SLOT, WIDTH)
        if OFFSET >= 0:
            return codes * scale + _tail(page[:, None], t + OFFSET, row_bytes, here, SLOT, WIDTH)
    return (codes - ZERO) * scale


@triton.jit(do_not_specialize=["rows", "new", "runs", "run"])  # type: ignore[untyped-decorator]
def _history(  # type: ignore[no-untyped-def]
    q, cache, table, lengths, sums, weights, heads, rows, new, runs, run, scaling,
    page_b, head_b, row_b, table_b, per_page,
    K0: tl.constexpr, K1: tl.constexpr, K_CODES: tl.constexpr, K_SCALE: tl.constexpr, K_OFFSET: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_CODES: tl.constexpr, V_SCALE: tl.constexpr, V_OFFSET: tl.constexpr,
    V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    KX: tl.constexpr, VX: tl.constexpr,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    HALF: tl.constexpr, BRAIN: tl.constexpr,
):  # fmt: skip
    """One run of tokens for some rows: its attention, and the log of the sum of its exponentials."""
    split = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    kx, vx = tl.arange(0, KX), tl.arange(0, VX)
    length = tl.load(lengths + b)
    stop = length // UNIT * UNIT
    position = length - new + r % new
    before = position // UNIT * UNIT
    row = tl.program_id(1).to(tl.int64) * rows + r

    # Of length at most 1 in every channel, so that no scale lifts it over float16's range.
    top = tl.zeros((ROWS,), tl.float32)
    queries = ()
    for j in tl.static_range(D // KX):
        asked = tl.load(q + row[:, None] * D + (j * KX + kx)[None, :], (r < rows)[:, None], 0.0) * scaling
        top = tl.maximum(top, tl.max(tl.abs(asked), 1))
        queries += (asked,)
    top = tl.where(top > 0, top, 1.0)
    units = ()
    wholes = ()
    for j in tl.static_range(D // KX):
        units += (queries[j] / top[:, None],)
        wholes += (tl.sum(queries[j] / top[:, None], 1),)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = ()
    for _ in tl.static_range(D // VX):
        acc += (tl.zeros((ROWS, VX), tl.float32),)
    # Whether a block's tokens share the ranges of channels.
    K_BLOCK: tl.constexpr = not K_BY_TOKEN and K_GROUP % N == 0
    V_BLOCK: tl.constexpr = not V_BY_TOKEN and V_GROUP % N == 0

    first = split * run
    for start in range(first, tl.minimum(first + run, stop), N):
        n = start + tl.arange(0, N)
        stored = n < stop
        number = tl.load(table + b * table_b + n // per_page, stored, 0).to(tl.int64)
        place = n % per_page
        page = cache + number * page_b + h * head_b
        at = page + place * row_b
        page_0 = cache + tl.load(table + b * table_b + start // per_page).to(tl.int64) * page_b + h * head_b
        place_0 = start % per_page
        k_first = _plane(at[:, None] + K_CODES, stored[:, None], kx, D, K0, KX)
        k_second = _plane(at[:, None] + K_CODES + D * K0 // 8, stored[:, None], kx, D, K1, KX)
        v_first = _plane(at[:, None] + V_CODES, stored[:, None], vx, D, V0, VX)
        v_second = _plane(at[:, None] + V_CODES + D * V0 // 8, stored[:, None], vx, D, V1, VX)

        scores = tl.zeros((ROWS, N), tl.float32)
        for j in tl.static_range(D // KX):
            if K_BLOCK:
                scale, offset = _of_block(
                    page_0, place_0, j * KX + kx, row_b, K_SCALE, K_OFFSET, K_GROUP, K_ZERO,
                    SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
                )  # fmt: skip
                codes = _codes(k_first, k_second, j, D, K0, K1, KX, HALF)
                scores = tl.dot((units[j] * scale[None, :]).to(HALF), tl.trans(codes), scores)
                scores += tl.sum(units[j] * offset[None, :], 1)[:, None]
            elif K_BY_TOKEN and K_GROUP % KX == 0:
                scale, offset = _of_tokens(at, stored, j * KX // K_GROUP, K_SCALE, K_OFFSET, K_ZERO)
                codes = _codes(k_first, k_second, j, D, K0, K1, KX, HALF)
                part = tl.dot(units[j].to(HALF), tl.trans(codes))
                scores += part * scale[None, :] + wholes[j][:, None] * offset[None, :]
            else:
                keys = _numbers(
                    _codes(k_first, k_second, j, D, K0, K1, KX, tl.float32), at, page, place, stored, j * KX + kx,
                    row_b, K_SCALE, K_OFFSET, K_BY_TOKEN, K_GROUP, K_ZERO,
                    SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
                )  # fmt: skip
                scores = tl.dot(units[j], tl.trans(keys), scores, input_precision="tf32")
        scores *= top[:, None]
        seen = (n[None, :] >= SINKS) & (n[None, :] < before[:, None])
        if WINDOW:
            seen &= position[:, None] - n[None, :] < WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(m, tl.max(scores, 1))
        from_peak = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp(m - from_peak)
        m = peak
        p = tl.exp(scores - from_peak[:, None])
        added = tl.sum(p, 1)
        total = total * fade + added
        news = ()
        for j in tl.static_range(D // VX):
            kept = acc[j] * fade[:, None]
            if V_BLOCK:
                scale, offset = _of_block(
                    page_0, place_0, j * VX + vx, row_b, V_SCALE, V_OFFSET, V_GROUP, V_ZERO,
                    SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
                )  # fmt: skip
                part = tl.dot(p.to(HALF), _codes(v_first, v_second, j, D, V0, V1, VX, HALF))
                news += (kept + part * scale[None, :] + added[:, None] * offset[None, :],)
            elif V_BY_TOKEN and V_GROUP % VX == 0:
                scale, offset = _of_tokens(at, stored, j * VX // V_GROUP, V_SCALE, V_OFFSET, V_ZERO)
                kept += tl.sum(p * offset[None, :], 1)[:, None]
                # Scales may be of any size, so probabilities times them want bfloat16's range.
                codes = _codes(v_first, v_second, j, D, V0, V1, VX, BRAIN)
                news += (tl.dot((p * scale[None, :]).to(BRAIN), codes, kept),)
            else:
                values = _numbers(
                    _codes(v_first, v_second, j, D, V0, V1, VX, tl.float32), at, page, place, stored, j * VX + vx,
                    row_b, V_SCALE, V_OFFSET, V_BY_TOKEN, V_GROUP, V_ZERO,
                    SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
                )  # fmt: skip
                news += (tl.dot(p, values, kept, input_precision="tf32"),)
        acc = news
    out = row * runs + split
    for j in tl.static_range(D // VX):
        made = acc[j] / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(sums + out[:, None] * D + (j * VX + vx)[None, :], made, (r < rows)[:, None])
    tl.store(weights + out, m + tl.log(total), r < rows)
