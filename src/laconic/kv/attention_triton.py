"""`kv_attention` on a GPU: flash-decoding that unpacks codes in registers and never multiplies one by its range.

A program attends over a run of tokens for all query heads of a key-value head; a second kernel joins the runs by their
log-sum-exps (flash-decoding). Codes enter tensor cores as the small whole numbers they are, and ranges go to the side
that is smaller: a key channel's scale into the query, a token's scale into its logit or its probability, a value
channel's scale into the sum over a block of tokens that share it.

Words of several bytes are read, and byte j of all words makes a product of its own. The two numbers that a tensor core
wants side by side are then the same bits of two words, at no cost in moving bytes, for keys (two channels) as for
values (two tokens). Which channels a product is of is of no matter to a sum over channels, and values' go where they
belong when they are stored.
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from laconic.kv.attention import Angles, Packed, Pair, segment
from laconic.kv.format import KvFormat
from laconic.kv.planes import planes

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("attention over a packed cache on a GPU needs Triton: pip install triton") from e

from laconic.kv.planes_triton import number_at, numbers, one, ranges, tiles
from laconic.kv.runs_triton import dense, join, or_one

# Tokens in 16 bit a program: few, so that none takes longer than those over packed tokens.
_DENSE_TOKENS = 64
# And of a block: what they take in registers and shared memory is not to be what limits the kernel.
_DENSE_BLOCK = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Tile:
    """tokens: of a block, at most. warps, stages: of a program. programs: how many each multiprocessor should get.

    As it stands it was the fastest on an H100 at 2, 3 and 8 bits, and at 4 in one of two tunings
    (benchmarks/kv_attention.py)."""

    tokens: int = 64
    warps: int = 1
    stages: int = 1
    programs: int = 16


def kv_attention_triton(
    q: Tensor,
    keys: Packed,
    values: Packed,
    window: Pair,
    sinks: Pair | None = None,
    scaling: float | None = None,
    starts: Tensor | None = None,
    angles: Angles | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """`kv_attention` for CUDA tensors, or any when Triton's interpreter runs it (TRITON_INTERPRET=1).

    tile: how work is cut. splits: programs over packed tokens of a head; as many as the GPU has room for if None.
    """
    batch, heads, new, D = q.shape
    q = q.contiguous()
    kv_heads, tokens = window[0].shape[1], keys.tokens
    rows = heads // kv_heads * new
    tile = tile or Tile()
    block = _block(tile.tokens, keys.fmt, values.fmt)
    wk, wv = (_rows(w) for w in window)
    sk, sv = (_rows(s) for s in sinks) if sinks is not None else (wk[:, :, :0], wv[:, :, :0])
    # Where all rows begin together, blocks of sinks alone are left out.
    sunk = min(sk.shape[2], tokens)
    skipped = sunk // block if starts is None else 0

    blocks = triton.cdiv(tokens, block) - skipped if tokens > sunk else 0
    splits = splits or triton.cdiv(tile.programs * _multiprocessors(q.device), batch * kv_heads)
    per_split = triton.cdiv(blocks, max(1, min(splits, blocks)))
    packed_splits = triton.cdiv(blocks, per_split) if blocks else 0
    sink_splits, window_splits = triton.cdiv(sunk, _DENSE_TOKENS), triton.cdiv(wk.shape[2], _DENSE_TOKENS)
    runs = sink_splits + window_splits + packed_splits

    sums = torch.empty(batch, heads, new, runs, D, device=q.device)
    weights = torch.empty(batch, heads, new, runs, device=q.device)
    out = torch.empty_like(q)
    # Channels that are turned against each other lie in different segments.
    k = _Side(keys, batch, kv_heads, D, D // 2 if angles else D)
    v = _Side(values, batch, kv_heads, D, D)
    cos, sin = (None, None) if angles is None else (a.contiguous() for a in angles)
    with torch.cuda.device_of(q):
        _attend[(runs, batch * kv_heads)](
            q, *k.tensors, *v.tensors, wk, wv, sk, sv, sums, weights, starts, cos, sin,
            0 if cos is None or len(cos) == 1 else cos.stride(0),
            kv_heads, tokens, wk.shape[2], sunk, sink_splits, window_splits, skipped * block, per_split * block,
            (D**-0.5 if scaling is None else scaling) * 1.4426950408889634,
            *k.strides, *v.strides, *wk.stride()[:3], *wv.stride()[:3], *sk.stride()[:3], *sv.stride()[:3],
            *k.layout, *v.layout,
            NEW=new, QUERIES=rows, ROWS=max(8, triton.next_power_of_2(rows)), D=D, N=block,
            DENSE=_DENSE_TOKENS, DENSE_N=_DENSE_BLOCK,
            # The interpreter has no assembler.
            FAST=q.is_cuda,
            num_warps=tile.warps * max(1, triton.next_power_of_2(rows) // 16), num_stages=tile.stages,
        )  # fmt: skip
        join[(batch * heads * new, D // min(D, 32))](sums, weights, out, runs, D=D, C=min(D, 32), RUNS=32, num_warps=2)
    return out


class _Side:
    """Keys or values as the kernel takes them."""

    def __init__(self, packed: Packed, batch: int, heads: int, D: int, most: int) -> None:
        fmt, stored = packed.fmt, packed.stored
        seg = min(segment(fmt, D), most)
        # A product has at least 16 words on a side.
        unit = min(4, seg // 16)
        widths = [8] if fmt.num_bits == 8 else [width for width, _ in planes(fmt.num_bits)]
        codes = _rows(stored["codes"]).view(_WORDS[unit])
        if fmt.group_size is None:
            assert packed.static is not None
            fixed = {n: packed.static[n] for n in ("scale", "offset") if n in packed.static}
            fixed = {n: p.expand(batch, heads, D)[:, :, None] for n, p in fixed.items()}
        else:
            fixed = {n: _rows(stored[n]) for n in ("scale", "offset") if n in stored}
        scale, offset = fixed["scale"], fixed.get("offset")
        levels = None if packed.static is None else packed.static.get("levels")
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric and fmt.datatype == "int" else 0
        by_token = fmt.axis == "token" and fmt.group_size is not None
        at, far = (_rows(stored[n]) if n in stored else None for n in ("outlier_index", "outlier_value"))
        self.tensors = codes, scale, offset, levels, at, far
        apart = [(0, 0) if t is None else t.stride()[:2] for t in (at, far)]
        self.strides = (*codes.stride()[:2], *scale.stride(), *apart[0], *apart[1])
        # In the order of the kernel's parameters.
        shape = widths[0], sum(widths[1:]), seg, unit, fmt.datatype
        self.layout = *shape, by_token, fmt.group_size or 0, zero, fmt.outliers(D)


def _rows(x: Tensor) -> Tensor:
    """`x` (batch, heads, tokens, n), copied unless rows lie one after another; batches and heads may lie anywhere."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _block(most: int, *formats: KvFormat) -> int:
    """Tokens of a block: a power of two, and where channels have ranges of their own, all of one group of tokens."""
    for fmt in formats:
        if fmt.axis == "channel" and fmt.group_size:
            most = min(most, fmt.group_size & -fmt.group_size)
    return most


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# These change from one token to the next, and nothing is to be compiled anew for it.
@triton.jit(do_not_specialize=["recent", "sunk", "sink_splits", "window_splits"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, kc, ks, ko, kl, k_at, k_far, vc, vs, vo, vl, v_at, v_far, wk, wv, sk, sv, sums, weights,
    starts, cos, sin, angles_b, heads, tokens, recent, sunk, sink_splits, window_splits, skipped, run, scaling,
    kc_b, kc_h, ks_b, ks_h, ks_t, ks_c, ka_b, ka_h, kf_b, kf_h,
    vc_b, vc_h, vs_b, vs_h, vs_t, vs_c, va_b, va_h, vf_b, vf_h,
    wk_b, wk_h, wk_t, wv_b, wv_h, wv_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    K0: tl.constexpr, K1: tl.constexpr, K_SEG: tl.constexpr, K_UNIT: tl.constexpr,
    K_TYPE: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_GROUP: tl.constexpr, K_ZERO: tl.constexpr, K_FAR: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_SEG: tl.constexpr, V_UNIT: tl.constexpr,
    V_TYPE: tl.constexpr, V_BY_TOKEN: tl.constexpr, V_GROUP: tl.constexpr, V_ZERO: tl.constexpr, V_FAR: tl.constexpr,
    NEW: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    DENSE: tl.constexpr,
    DENSE_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One run of tokens: its attention, and the log2 of the sum of its exponentials."""
    split, runs = tl.program_id(0), tl.num_programs(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    r = tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * QUERIES + r
    q_at, out_at = q + row * D, sums + (row * runs + split) * D
    # The first token that is seen, and the first that is seen as it is packed.
    begin = tl.zeros((), tl.int32)
    if starts is not None:
        begin += tl.load(starts + b)
    sunk = tl.maximum(tl.minimum(sunk, tokens - begin), 0)
    unsunk = begin + sunk
    if split < sink_splits:
        first = split * DENSE
        dense(
            q_at, sk + b * sk_b + h * sk_h, sv + b * sv_b + h * sv_h, sk_t, sv_t, first, 0, sunk + 0 * r, sunk, scaling,
            out_at, weights + row * runs + split, r < QUERIES, D, DENSE_N, DENSE, ROWS,
        )  # fmt: skip
    elif split < sink_splits + window_splits:
        first = (split - sink_splits) * DENSE
        dense(
            q_at, wk + b * wk_b + h * wk_h, wv + b * wv_b + h * wv_h, wk_t, wv_t, first, begin - tokens,
            recent - NEW + 1 + r % NEW, recent, scaling,
            out_at, weights + row * runs + split, r < QUERIES, D, DENSE_N, DENSE, ROWS,
        )  # fmt: skip
    else:
        K_X: tl.constexpr = K_SEG // K_UNIT
        V_X: tl.constexpr = V_SEG // V_UNIT
        K_PLANES: tl.constexpr = 2 if K1 and K_TYPE == "int" else 1
        V_PLANES: tl.constexpr = 2 if V1 and V_TYPE == "int" else 1
        kx, vx = tl.arange(0, K_X), tl.arange(0, V_X)
        kc += b * kc_b + h * kc_h
        vc += b * vc_b + h * vc_h
        k_range, v_range = b * ks_b + h * ks_h, b * vs_b + h * vs_h
        if K_FAR:
            k_at += b * ka_b + h * ka_h
            k_far += b * kf_b + h * kf_h
        if V_FAR:
            v_at += b * va_b + h * va_h
            v_far += b * vf_b + h * vf_h

        # Of length at most 1 in every channel, so that no scale lifts it over float16's range.
        top = tl.zeros((ROWS,), tl.float32)
        queries = ()
        for i in tl.static_range(D // K_X):
            c = (i // K_UNIT) * K_SEG + kx * K_UNIT + i % K_UNIT
            loaded = tl.load(q_at[None, :] + c[:, None], (r < QUERIES)[None, :], 0.0).to(tl.float32) * scaling
            top = tl.maximum(top, tl.max(tl.abs(loaded), 0))
            queries += (loaded,)
        top = tl.where(top > 0, top, 1.0)
        units = ()
        for i in tl.static_range(D // K_X):
            units += (queries[i] / top[None, :],)
        wholes = ()
        for s in tl.static_range(D // K_SEG):
            whole = tl.zeros((ROWS,), tl.float32)
            for j in tl.static_range(K_UNIT):
                whole += tl.sum(units[s * K_UNIT + j], 0)
            wholes += (whole,)

        m = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = ()
        for _ in tl.static_range(D // V_X):
            acc += (tl.zeros((V_X, ROWS), tl.float32),)
        lifts = ()
        for _ in tl.static_range(D // V_SEG):
            lifts += (tl.zeros((ROWS,), tl.float32),)

        first = skipped + (split - sink_splits - window_splits) * run
        # No block is without a token that is seen, so that a maximum is a number.
        last = tl.where(unsunk < tokens, tl.minimum(first + run, tokens), 0)
        for block in range(tl.maximum(first, unsunk // N * N), last, N):
            start = tl.multiple_of(block, N)
            n = start + tl.arange(0, N)
            here = n < tokens
            k_tiles = tiles(kc, n, here, kx, (K0 + K1) * D // 8, K_X, K_UNIT)
            v_tiles = tiles(vc, n, here, vx, (V0 + V1) * D // 8, V_X, V_UNIT)

            logits = tl.zeros((N, ROWS), tl.float32)
            if cos is not None:
                # Here a key meets its own angle before its query, so it has to be a number of its own.
                turns = b * angles_b + n[:, None] * (D // 2)
                for s in tl.static_range(D // K_SEG // 2):
                    for j in tl.static_range(K_UNIT):
                        c = s * K_SEG + kx * K_UNIT + j
                        low = _keys(
                            k_tiles, s, j, kl, ks, ko, k_range, n, here, start, kx, ks_t, ks_c,
                            K0, K1, D, K_SEG, K_UNIT, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, FAST,
                        )  # fmt: skip
                        high = _keys(
                            k_tiles, s + D // K_SEG // 2, j, kl, ks, ko, k_range, n, here, start, kx, ks_t, ks_c,
                            K0, K1, D, K_SEG, K_UNIT, K_TYPE, K_BY_TOKEN, K_GROUP, K_ZERO, FAST,
                        )  # fmt: skip
                        across = tl.load(cos + turns + c[None, :], here[:, None], 0.0).to(tl.float32)
                        along = tl.load(sin + turns + c[None, :], here[:, None], 0.0).to(tl.float32)
                        first_half = (low * across - high * along).to(tl.float16)
                        second_half = (high * across + low * along).to(tl.float16)
                        logits = tl.dot(first_half, units[s * K_UNIT + j].to(tl.float16), logits)
                        logits = tl.dot(second_half, units[s * K_UNIT + j + D // K_X // 2].to(tl.float16), logits)
                logits *= top[None, :]
            elif K_BY_TOKEN:
                for s in tl.static_range(D // K_SEG):
                    at = k_range + n * ks_t + s * K_SEG // K_GROUP
                    scale, offset = ranges(ks, ko, at, here, K_ZERO)
                    part = tl.zeros((N, ROWS), tl.float32)
                    for j in tl.static_range(K_UNIT):
                        query = units[s * K_UNIT + j].to(tl.float16)
                        for plane in tl.static_range(K_PLANES):
                            codes = numbers(k_tiles, s, j, kl, K0, K1, D, K_SEG, K_UNIT, K_TYPE, FAST, plane)
                            part = tl.dot(codes, query, part)
                    logits += part * (scale * one(K_TYPE))[:, None] + offset[:, None] * wholes[s][None, :]
                logits *= top[None, :]
            else:
                lift = tl.zeros((K_X, ROWS), tl.float32)
                for i in tl.static_range(D // K_X):
                    c = (i // K_UNIT) * K_SEG + kx * K_UNIT + i % K_UNIT
                    at = k_range + (start // K_GROUP if K_GROUP else 0) * ks_t + c * ks_c
                    scale, offset = ranges(ks, ko, at, kx < K_X, K_ZERO)
                    lift += units[i] * offset[:, None]
                    query = (units[i] * scale[:, None]).to(tl.float16)
                    for plane in tl.static_range(K_PLANES):
                        codes = numbers(
                            k_tiles, i // K_UNIT, i % K_UNIT, kl, K0, K1, D, K_SEG, K_UNIT, K_TYPE, FAST, plane
                        )
                        logits = tl.dot(codes, query, logits)
                logits = logits * (top * one(K_TYPE))[None, :] + (tl.sum(lift, 0) * top)[None, :]
            for j in tl.static_range(K_FAR):
                # What a token's number apart is more than the one that its code says.
                place = tl.load(k_at + n * K_FAR + j, here, 0).to(tl.int32)
                if K_BY_TOKEN:
                    at = k_range + n * ks_t + place // K_GROUP
                else:
                    at = k_range + (start // K_GROUP if K_GROUP else 0) * ks_t + place * ks_c
                scale, offset = ranges(ks, ko, at, here, K_ZERO)
                far = tl.load(k_far + n * K_FAR + j, here, 0.0).to(tl.float32)
                far -= number_at(kc, n, here, place, kl, K0, K1, D, K_TYPE) * scale + offset
                asked = tl.load(q_at[None, :] + place[:, None], (r < QUERIES)[None, :], 0.0).to(tl.float32) * scaling
                if cos is not None:
                    partner = (place + D // 2) % D
                    other = tl.load(q_at[None, :] + partner[:, None], (r < QUERIES)[None, :], 0.0).to(tl.float32)
                    angle = b * angles_b + n * (D // 2) + place % (D // 2)
                    asked *= tl.load(cos + angle, here, 0.0).to(tl.float32)[:, None]
                    across = tl.load(sin + angle, here, 0.0).to(tl.float32)
                    asked += other * scaling * tl.where(place < D // 2, across, -across)[:, None]
                logits += far[:, None] * asked
            logits = tl.where((here & (n >= unsunk))[:, None], logits, float("-inf"))

            if V_BY_TOKEN:
                # Probabilities times scales are at most 1, however large a scale or small another, since the running
                # maximum is theirs: none overflows float16, and only what is nothing beside the largest underflows.
                widest = tl.zeros((N,), tl.float32)
                for s in tl.static_range(D // V_SEG):
                    at = v_range + n * vs_t + s * V_SEG // V_GROUP
                    widest = tl.maximum(widest, tl.load(vs + at, here, 1.0).to(tl.float32))
                peak = tl.max(logits + tl.log2(widest)[:, None], 0)
            else:
                peak = tl.max(logits, 0)
            peak = tl.maximum(m, peak)
            fade = tl.exp2(m - peak)
            m = peak
            p = tl.exp2(logits - m[None, :])
            added = tl.sum(p, 0)
            total = total * fade + added
            news = ()
            new_lifts = ()
            for s in tl.static_range(D // V_SEG):
                weighed = p
                if V_BY_TOKEN:
                    at = v_range + n * vs_t + s * V_SEG // V_GROUP
                    scale, offset = ranges(vs, vo, at, here, V_ZERO)
                    weighed = p * scale[:, None]
                    new_lifts += (lifts[s] * fade + tl.sum(p * offset[:, None], 0),)
                weighed = weighed.to(tl.float16)
                for j in tl.static_range(V_UNIT):
                    kept = acc[s * V_UNIT + j] * fade[None, :]
                    part = kept if V_BY_TOKEN else tl.zeros((V_X, ROWS), tl.float32)
                    for plane in tl.static_range(V_PLANES):
                        codes = numbers(v_tiles, s, j, vl, V0, V1, D, V_SEG, V_UNIT, V_TYPE, FAST, plane)
                        part = tl.dot(tl.trans(codes), weighed, part)
                    if V_BY_TOKEN:
                        news += (part,)
                    else:
                        at = v_range + (start // V_GROUP if V_GROUP else 0) * vs_t
                        at += (s * V_SEG + vx * V_UNIT + j) * vs_c
                        scale, offset = ranges(vs, vo, at, vx < V_X, V_ZERO)
                        news += (kept + part * (scale * one(V_TYPE))[:, None] + offset[:, None] * added[None, :],)
            for j in tl.static_range(V_FAR):
                place = tl.load(v_at + n * V_FAR + j, here, 0).to(tl.int32)
                if V_BY_TOKEN:
                    at = v_range + n * vs_t + place // V_GROUP
                else:
                    at = v_range + (start // V_GROUP if V_GROUP else 0) * vs_t + place * vs_c
                scale, offset = ranges(vs, vo, at, here, V_ZERO)
                far = tl.load(v_far + n * V_FAR + j, here, 0.0).to(tl.float32)
                far -= number_at(vc, n, here, place, vl, V0, V1, D, V_TYPE) * scale + offset
                if V_BY_TOKEN:
                    far *= 1 / one(V_TYPE)
                weighed = p * far[:, None]
                more = ()
                for i in tl.static_range(D // V_X):
                    own = (i // V_UNIT) * V_SEG + vx * V_UNIT + i % V_UNIT
                    hit = (own[:, None] == place[None, :]).to(tl.float32)
                    more += (tl.dot(hit, weighed, news[i], input_precision="tf32"),)
                news = more
            acc = news
            if V_BY_TOKEN:
                lifts = new_lifts

        for i in tl.static_range(D // V_X):
            c = (i // V_UNIT) * V_SEG + vx * V_UNIT + i % V_UNIT
            x = acc[i]
            if V_BY_TOKEN:
                x = x * one(V_TYPE) + lifts[i // V_UNIT][None, :]
            tl.store(out_at[None, :] + c[:, None], x / or_one(total)[None, :], (r < QUERIES)[None, :])
        tl.store(weights + row * runs + split, m + tl.log2(total), r < QUERIES)


@triton.jit  # type: ignore[untyped-decorator]
def _keys(  # type: ignore[no-untyped-def]
    words, S: tl.constexpr, J: tl.constexpr, levels, scales, offsets, at, n, here, start, x, by_time, by_channel,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, D: tl.constexpr, SEG: tl.constexpr, UNIT: tl.constexpr,
    TYPE: tl.constexpr, BY_TOKEN: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Byte J of the words of segment S, as the keys that they stand for: (tokens, words) float32."""
    codes = numbers(words, S, J, levels, WIDTH_0, WIDTH_1, D, SEG, UNIT, TYPE, FAST, 0)
    if WIDTH_1 and TYPE == "int":
        codes += numbers(words, S, J, levels, WIDTH_0, WIDTH_1, D, SEG, UNIT, TYPE, FAST, 1)
    if BY_TOKEN:
        scale, offset = ranges(scales, offsets, at + n * by_time + S * SEG // GROUP, here, ZERO)
        return codes.to(tl.float32) * (scale * one(TYPE))[:, None] + offset[:, None]
    at += (start // GROUP if GROUP else 0) * by_time
    scale, offset = ranges(scales, offsets, at + (S * SEG + x * UNIT + J) * by_channel, x < SEG // UNIT, ZERO)
    return codes.to(tl.float32) * (scale * one(TYPE))[None, :] + offset[None, :]
