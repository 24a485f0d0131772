"""AutoRound (Cheng et al., arXiv 2309.05516): tune rounding and clipping by signed gradient descent, block by block.

Q(W) = s * clip(round(W / s + V) + z): V in [-0.5, 0.5] decides whether a weight is rounded up or down, a and b how much
of each group's range the grid covers. All three are tuned by the sign of their gradient (eq. 3-5), so that the block's
output on the compressed model's activations comes close to the original model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import Params, Quantized, ScalarFormat
from laconic.formats.chunks import chunk_rows
from laconic.stages.block import Block, BlockStage, stacked
from laconic.stages.linear import Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs
from laconic.train.block_tuning import SignSGD, block_output, freeze_where, tune, unstack

# Tolerance of float32 for values half a step away from their code.
_ROUNDING = 1 + 1e-4


class AutoRound(QuantizingStage, BlockStage):
    """Tune rounding offsets and ranges.

    Attributes:
        iters: steps a block.
        batch_size: samples a step.
        lr: largest move of V a step; 1 / iters if not given.
        clip: tune ranges as well.
        asymmetric_calibration: aim at the original model's output, rather than at the output of the uncompressed block
            for the compressed model's activations.
    """

    example: ClassVar = {"scheme": "W4A16", "group_size": 32, "iters": 3, "batch_size": 2}
    renamed: ClassVar = {"asymmetric": "asymmetric_calibration"}

    method: Literal["autoround"] = "autoround"
    iters: int = Field(200, ge=1)
    batch_size: int = Field(2, ge=1)
    lr: float | None = Field(None, gt=0)
    clip: bool = True
    asymmetric_calibration: bool = True

    @property
    def needs(self) -> Needs:
        return replace(super().needs, activations=True, cross_moments=self.asymmetric_calibration)

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        stacks = [stack for tap in block.targeted_taps() for stack in block.stacks(tap)]
        tuned = {s: _Tuned.start(s.format, stacked(block.module, s.linears, block.dtype)) for s in stacks}
        targets = block.original_output.hidden if block.original_output else block_output(block)

        def weights() -> Mapping[str, Tensor]:
            by_name: dict[str, Tensor] = {}
            for stack, parts in tuned.items():
                by_name |= unstack(block.module, stack.linears, parts.weight(stack.format, block.dtype))
            return by_name

        step = self.lr or 1 / self.iters
        optimizers = [SignSGD([t.V], step, (-0.5, 0.5)) for t in tuned.values()]
        if self.clip:
            optimizers += [SignSGD([end], step, (0.1, 1)) for t in tuned.values() for end in (t.low, t.high)]
        result = tune(
            block,
            weights,
            optimizers,
            targets,
            iters=self.iters,
            batch_size=self.batch_size,
            activations=block.dynamic_activations(),
        )
        if not result.improved:
            for parts in tuned.values():
                parts.reset()
        return {s.linears: Outcome(t.quantized(s.format, block.dtype), result.notes) for s, t in tuned.items()}


@dataclass(frozen=True)
class _Tuned:
    """The tuned parameters of stacked linears.

    Attributes:
        W: (out, in).
        V: rounding offsets, in tiles (..., n).
        lo: lower end of the range of each tile (...).
        hi: upper end.
        low: how much of the lower end is covered, (...).
        high: how much of the upper end is.
    """

    W: Tensor
    V: Tensor
    lo: Tensor
    hi: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def start(cls, fmt: ScalarFormat, W: Tensor) -> _Tuned:
        """Start from rounding to nearest over the whole range."""
        tiles = fmt.tiling.split(W)
        lo, hi = tiles.amin(-1).float(), tiles.amax(-1).float()
        V, low, high = torch.empty_like(tiles, dtype=torch.float32), torch.empty_like(lo), torch.empty_like(hi)
        # Zeros stay zeros: nearest is zero, and no gradient moves them.
        V = freeze_where(V.requires_grad_(), tiles == 0)
        tuned = cls(W, V, lo, hi, low.requires_grad_(), high.requires_grad_())
        tuned.reset()
        return tuned

    def reset(self) -> None:
        """Go back to rounding to nearest over the whole range."""
        self.V.data.zero_()
        self.low.data.fill_(1)
        self.high.data.fill_(1)

    def params(self, fmt: ScalarFormat, dtype: torch.dtype) -> Params:
        """Return the parameters as they will be stored."""
        with torch.no_grad():
            lo, hi = self.lo * self.low, self.hi * self.high
            shared = fmt.shared(lo, hi)
            return {**fmt.from_range(lo, hi, dtype, shared), **shared}

    def weight(self, fmt: ScalarFormat, dtype: torch.dtype) -> Tensor:
        """Return the rounded weight in `dtype`, differentiable in V, low and high through the rounding."""
        span = _span(fmt, self.lo * self.low, self.hi * self.high)
        tiles, params = fmt.tiling.split(self.W), self.params(fmt, dtype)
        rounded: Tensor = _Round.apply(tiles, self.V, span, fmt, params, dtype)  # type: ignore[no-untyped-call]
        return fmt.tiling.join(rounded, self.W.shape)

    def quantized(self, fmt: ScalarFormat, dtype: torch.dtype) -> Quantized:
        """Return the codes and parameters of the present offsets and ranges."""
        params = self.params(fmt, dtype)
        with torch.no_grad():
            shifted = fmt.tiling.split(self.W) + self.V * fmt.unit(params).unsqueeze(-1)
            codes = fmt.tiling.join(fmt.encode_tiles(shifted, params), self.W.shape)
        return Quantized.scalar(fmt, codes, params)


def _span(fmt: ScalarFormat, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the span of a grid, to which its scale is proportional."""
    return torch.maximum(-lo, hi) if fmt.symmetric else hi.clamp(min=0) - lo.clamp(max=0)


class _Round(torch.autograd.Function):
    """Q = s c, c the rounding of u = W / s + V, with a straight-through gradient.

    Where W is not clipped, dQ/dV = s and dQ/ds = c - W / s; where it is clipped, 0 and c. s is proportional to the span
    of the grid.

    No result as large as W is kept for the backward pass: rounding again costs less than the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, V: Tensor, span: Tensor, fmt: ScalarFormat, params: Params, dtype: torch.dtype
    ) -> Tensor:
        s = fmt.unit(params).unsqueeze(-1)
        ctx.save_for_backward(W, V, s, span)
        ctx.fmt, ctx.params = fmt, params
        out = torch.empty(W.shape, dtype=dtype, device=W.device)
        for rows in _chunks(W):
            shifted = torch.addcmul(W[rows].float(), V[rows], s[rows])
            out[rows] = fmt.snap_tiles(shifted, _of(params, rows, W))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W, V, s, span = ctx.saved_tensors
        fmt, (grad,) = ctx.fmt, grads
        to_V, to_span = torch.empty_like(V), torch.zeros_like(span)
        for rows in _chunks(W):
            w, unit, g = W[rows].float(), s[rows], grad[rows].float()
            shifted = torch.addcmul(w, V[rows], unit)
            Q = fmt.snap_tiles(shifted, _of(ctx.params, rows, W))
            inside = (shifted.sub_(Q).abs_() <= unit.abs() * (fmt.widest_step / 2 * _ROUNDING)).to(w.dtype)
            if ctx.needs_input_grad[2]:
                # s dQ/ds, summed over the tile; s is proportional to the span.
                by_scale = Q.addcmul_(w, inside, value=-1).mul_(g).sum(-1)
                to_span[rows] = by_scale / span[rows].clamp(min=1e-30)
            torch.mul(inside.mul_(g), unit, out=to_V[rows])
        return None, to_V, to_span, None, None, None


def _chunks(tiles: Tensor) -> Iterator[slice]:
    step = chunk_rows(tiles)
    for start in range(0, len(tiles), step):
        yield slice(start, start + step)


def _of(params: Params, rows: slice, tiles: Tensor) -> Params:
    """Return the parameters of some rows of tiles; those of the whole tensor hold for every tile."""
    return {n: p[rows] if p.dim() == tiles.dim() - 1 else p for n, p in params.items()}
