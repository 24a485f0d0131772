"""Parts of flash-decoding: attention over one split of tokens in 16 bit, and how all splits are combined.

A *split* is a run of tokens whose attention is a program of its own. A *row* is one of the queries that share a
key-value head.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class LaunchConfig:
    """Division of a kernel's work.

    Attributes:
        block_tokens: Tokens of a block, at most: those that a program reads at once.
        warps: Warps of a program.
        stages: Blocks that are loaded ahead.
        programs: Programs for each multiprocessor.
        registers: Registers of a thread, at most: fewer let a multiprocessor run more programs at once, which hides
            more of their waiting, and may spill. None: as many as the compiler wants.
    """

    block_tokens: int = 64
    warps: int = 1
    stages: int = 1
    programs: int = 16
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch, but for warps."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_stages": self.stages} | limit


@triton.jit  # type: ignore[untyped-decorator]
def attend_dense(  # type: ignore[no-untyped-def]
    # Queries of each row; keys and values of the head, and the strides of their tokens.
    q_rows, k, v, k_stride, v_stride,
    # First token of the split; first visible token; of each row the token after its last visible one; after all.
    first, begin, stops, stop, scaling,
    # Where the results of each row go; rows that exist.
    out_rows, log_sum_rows, row_mask,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute attention over one split of tokens in 16 bit, and the log2 of the sum of its exponentials."""
    c = tl.arange(0, CHANNELS)
    queries = tl.load(q_rows[None, :] + c[:, None], row_mask[None, :], 0.0).to(k.dtype.element_ty)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((CHANNELS, ROWS), tl.float32)
    for start in range(first, tl.minimum(first + SPLIT, stop), BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = (n < stop)[:, None]
        keys = tl.load(k + n[:, None] * k_stride + c[None, :], mask, 0.0)
        values = tl.load(v + n[:, None] * v_stride + c[None, :], mask, 0.0)
        visible = (n >= begin)[:, None] & (n[:, None] < stops[None, :])
        logits = tl.where(visible, tl.dot(keys, queries, input_precision="ieee") * scaling, float("-inf"))
        peak = tl.maximum(m, tl.max(logits, 0))
        finite_peak = finite_or_zero(peak)
        rescale = tl.exp2(m - finite_peak)
        m = peak
        p = tl.exp2(logits - finite_peak[None, :])
        total = total * rescale + tl.sum(p, 0)
        acc = tl.dot(tl.trans(values), p.to(values.dtype), acc * rescale[None, :], input_precision="ieee")
    tl.store(out_rows[None, :] + c[:, None], acc / positive_or_one(total)[None, :], row_mask[None, :])
    tl.store(log_sum_rows, m + tl.log2(total), row_mask)


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def combine_splits(  # type: ignore[no-untyped-def]
    # Attention (rows, splits, channels) and log2 of the sum of exponentials (rows, splits) of each split; the result.
    sums, log_sums, out, splits,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine TILE channels of one row's attention over all splits; those without visible tokens weigh 2^-inf."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m = float("-inf")
    total = 0.0
    acc = tl.zeros((TILE,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        log_sum = tl.load(log_sums + row * splits + split, split < splits, float("-inf"))
        x = tl.load(sums + (row * splits + split)[:, None] * CHANNELS + c[None, :], (split < splits)[:, None], 0.0)
        peak = tl.maximum(m, tl.max(log_sum, 0))
        finite_peak = finite_or_zero(peak)
        rescale = tl.exp2(m - finite_peak)
        m = peak
        p = tl.exp2(log_sum - finite_peak)
        total = total * rescale + tl.sum(p, 0)
        acc = acc * rescale + tl.sum(p[:, None] * x, 0)
    tl.store(out + row * CHANNELS + c, (acc / positive_or_one(total)).to(out.dtype.element_ty))


@triton.jit
def finite_or_zero(peak):  # type: ignore[no-untyped-def]
    """Return a maximum, or 0 where no token is visible."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def positive_or_one(total):  # type: ignore[no-untyped-def]
    """Return the divisor of a sum, 1 where no token is visible."""
    return tl.where(total > 0, total, 1.0)
