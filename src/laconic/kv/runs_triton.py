"""Runs of tokens of flash-decoding: one of tokens in 16 bit, and how the attention of all runs is joined."""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def dense(  # type: ignore[no-untyped-def]
    q_at, k, v, k_t, v_t, first, begin, stops, stop, scaling, out_at, weight_at, rows,
    D: tl.constexpr, N: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One run of tokens in 16 bit, of which every row sees those from `begin` to its own of `stops`."""
    d = tl.arange(0, D)
    query = tl.load(q_at[None, :] + d[:, None], rows[None, :], 0.0).to(k.dtype.element_ty)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((D, ROWS), tl.float32)
    for start in range(first, tl.minimum(first + DENSE, stop), N):
        n = start + tl.arange(0, N)
        here = (n < stop)[:, None]
        keys = tl.load(k + n[:, None] * k_t + d[None, :], here, 0.0)
        values = tl.load(v + n[:, None] * v_t + d[None, :], here, 0.0)
        seen = (n >= begin)[:, None] & (n[:, None] < stops[None, :])
        logits = tl.where(seen, tl.dot(keys, query, input_precision="ieee") * scaling, float("-inf"))
        peak = tl.maximum(m, tl.max(logits, 0))
        from_peak = or_zero(peak)
        fade = tl.exp2(m - from_peak)
        m = peak
        p = tl.exp2(logits - from_peak[None, :])
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(tl.trans(values), p.to(values.dtype), acc * fade[None, :], input_precision="ieee")
    tl.store(out_at[None, :] + d[:, None], acc / or_one(total)[None, :], rows[None, :])
    tl.store(weight_at, m + tl.log2(total), rows)


@triton.jit(do_not_specialize=["runs"])  # type: ignore[untyped-decorator]
def join(  # type: ignore[no-untyped-def]
    sums, weights, out, runs, D: tl.constexpr, C: tl.constexpr, RUNS: tl.constexpr
):
    """C channels of one query's attention, from all its runs; those that saw nothing weigh 2^-inf."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    m = float("-inf")
    total = 0.0
    acc = tl.zeros((C,), tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        weight = tl.load(weights + row * runs + run, run < runs, float("-inf"))
        x = tl.load(sums + (row * runs + run)[:, None] * D + c[None, :], (run < runs)[:, None], 0.0)
        peak = tl.maximum(m, tl.max(weight, 0))
        from_peak = or_zero(peak)
        fade = tl.exp2(m - from_peak)
        m = peak
        p = tl.exp2(weight - from_peak)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(p[:, None] * x, 0)
    tl.store(out + row * D + c, (acc / or_one(total)).to(out.dtype.element_ty))


@triton.jit
def or_zero(peak):  # type: ignore[no-untyped-def]
    """A maximum, 0 where nothing was seen."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def or_one(total):  # type: ignore[no-untyped-def]
    """What a sum is divided by, 1 where nothing was seen."""
    return tl.where(total > 0, total, 1.0)
