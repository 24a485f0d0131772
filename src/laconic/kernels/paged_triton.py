"""Attention over the packed history in pages, on a GPU: flash-decoding that reads codes and ranges by block table.

What a page holds is `serving.paged`'s affair: it gives strides and places of bytes, and joins what comes out with a
token's own unit and a text's exact first tokens. Numbers are decoded in registers, byte by byte, since slots lie at any
multiple of a byte.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats.kv import KvFormat
from laconic.formats.planes import planes

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("attention over packed pages on a GPU needs Triton: pip install triton") from e

_TOKENS, _ROWS = 32, 16


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
        widths = [8] if fmt.num_bits == 8 else [width for width, _ in planes(fmt.num_bits)]
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric else 0
        by_token = int(fmt.axis == "token")
        return widths[0], sum(widths[1:]), self.codes, self.scale, self.offset, by_token, fmt.group_size or 0, zero


def fits_pages(fmt: KvFormat, channels: int) -> bool:
    """Whether the kernel reads this format: whole codes of 2, 3, 4 or 8 bits with ranges of their own."""
    plain = fmt.datatype == "int" and not fmt.outlier_ratio and fmt.group_size is not None
    return plain and fmt.num_bits in (2, 3, 4, 8) and channels >= 16 and not channels & (channels - 1)


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
    of `shared` bytes. splits: runs of tokens of a head; as many as fill a GPU if None.
    Returns: the attention, as q, and the log of the sum of its exponentials, (..., 1); zero and -inf over nothing.
    """
    batch, heads, each, new, D = q.shape
    rows = each * new
    chunks = triton.cdiv(rows, _ROWS)
    if splits is None:
        busy = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = triton.cdiv(8 * busy, batch * heads * chunks)
    blocks = max(1, triton.cdiv(longest, _TOKENS))
    run = triton.cdiv(blocks, min(splits, blocks)) * _TOKENS
    runs = triton.cdiv(blocks * _TOKENS, run)
    sums = torch.empty(batch, heads, each, new, runs, D, device=q.device)
    weights = torch.empty(batch, heads, each, new, runs, device=q.device)
    q, table, lengths = q.contiguous(), table.int().contiguous(), lengths.int().contiguous()
    with torch.cuda.device_of(q):
        _history[(runs, batch * heads, chunks)](
            q, cache, table, lengths, sums, weights, heads, rows, new, runs, run, scale,
            cache.stride(0), cache.stride(1), cache.stride(2), table.stride(0), cache.shape[2],
            *keys.constants(), *values.constants(),
            SLOT=slot, WIDTH=max(1, width), SHARED_AT=shared_at, SHARED=shared, UNIT=unit, SINKS=sinks,
            WINDOW=window or 0, D=D, N=_TOKENS, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    whole = weights.logsumexp(-1, keepdim=True)
    shares = torch.exp(weights - whole.masked_fill(whole == -torch.inf, 0))
    return (sums * shares[..., None]).sum(-2), whole


@triton.jit
def _half(at, here):  # type: ignore[no-untyped-def]
    """A float16 from two bytes that lie anywhere."""
    low, high = tl.load(at, here, 0).to(tl.int16), tl.load(at + 1, here, 0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _field(at, here, d, D: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Field of channel d in a plane."""
    per: tl.constexpr = D * BITS // 8
    byte = tl.load(at + (d % per)[None, :], here, 0).to(tl.int32)
    return (byte >> ((d // per) * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _decoded(  # type: ignore[no-untyped-def]
    row, page, place, row_bytes, here, d,
    W0: tl.constexpr, W1: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    BY_TOKEN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Numbers of tokens, (tokens, channels) float32."""
    codes = _field(row + CODES, here, d, D, W0)
    if W1:
        codes += _field(row + CODES + D * W0 // 8, here, d, D, W1) << W0
    if BY_TOKEN:
        at = row + SCALE + (d // GROUP * 2)[None, :]
        scale = _half(at, here)
        if OFFSET >= 0:
            return codes * scale + _half(at + (OFFSET - SCALE), here)
    else:
        within = place % UNIT // GROUP
        begin = (SHARED_AT + place // UNIT * SHARED + within * D * 2)[:, None] + (d * 2)[None, :]
        scale = _tail(page, begin + SCALE, row_bytes, here, SLOT, WIDTH)
        if OFFSET >= 0:
            return codes * scale + _tail(page, begin + OFFSET, row_bytes, here, SLOT, WIDTH)
    return (codes - ZERO) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _tail(page, t, row_bytes, here, SLOT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float16 at byte t of a page's tail, which may go on in the next row."""
    low = tl.load(page + t // WIDTH * row_bytes + SLOT + t % WIDTH, here, 0).to(tl.int16)
    t += 1
    high = tl.load(page + t // WIDTH * row_bytes + SLOT + t % WIDTH, here, 0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "new", "runs", "run"])  # type: ignore[untyped-decorator]
def _history(  # type: ignore[no-untyped-def]
    q, cache, table, lengths, sums, weights, heads, rows, new, runs, run, scaling,
    page_b, head_b, row_b, table_b, per_page,
    K0: tl.constexpr, K1: tl.constexpr, K_CODES: tl.constexpr, K_SCALE: tl.constexpr, K_OFFSET: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_CODES: tl.constexpr, V_SCALE: tl.constexpr, V_OFFSET: tl.constexpr,
    V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, SHARED_AT: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One run of tokens for some rows: its attention, and the log of the sum of its exponentials."""
    split = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    length = tl.load(lengths + b)
    position = length - new + r % new
    before = position // UNIT * UNIT
    row = tl.program_id(1).to(tl.int64) * rows + r
    query = tl.load(q + row[:, None] * D + d[None, :], (r < rows)[:, None], 0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    first = split * run
    for start in range(first, tl.minimum(first + run, length // UNIT * UNIT), N):
        n = start + tl.arange(0, N)
        stored = n < length // UNIT * UNIT
        here = stored[:, None]
        number = tl.load(table + b * table_b + n // per_page, stored, 0).to(tl.int64)
        place = n % per_page
        page = (cache + number * page_b + h * head_b)[:, None]
        at = page + (place * row_b)[:, None]
        keys = _decoded(
            at, page, place, row_b, here, d, K0, K1, K_CODES, K_SCALE, K_OFFSET, K_BY_TOKEN, K_GROUP, K_ZERO,
            SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
        )  # fmt: skip
        values = _decoded(
            at, page, place, row_b, here, d, V0, V1, V_CODES, V_SCALE, V_OFFSET, V_BY_TOKEN, V_GROUP, V_ZERO,
            SLOT, WIDTH, SHARED_AT, SHARED, UNIT, D,
        )  # fmt: skip
        seen = (n[None, :] >= SINKS) & (n[None, :] < before[:, None])
        if WINDOW:
            seen &= position[:, None] - n[None, :] < WINDOW
        scores = tl.where(seen, tl.dot(query, tl.trans(keys), input_precision="tf32") * scaling, float("-inf"))
        peak = tl.maximum(m, tl.max(scores, 1))
        from_peak = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp(m - from_peak)
        m = peak
        p = tl.exp(scores - from_peak[:, None])
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p, values, input_precision="tf32")
    there = r < rows
    out = row * runs + split
    tl.store(sums + out[:, None] * D + d[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], there[:, None])
    tl.store(weights + out, m + tl.log(total), there)
