"""AutoRound (Cheng et al., arXiv 2309.05516): rounding and clipping tuned by signed gradient descent, block by block.

Q(W) = s * clip(round(W / s + V) + z): V in [-0.5, 0.5] decides which way a weight is rounded, a and b how much of each
group's range the grid covers; all three move by the sign of their gradient (eq. 3-5) so that the block's output on the
compressed model's activations comes near to the original model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.engine.block import Block, stacked, stacks
from laconic.engine.stage import BlockStage, Outcome, QuantizingStage
from laconic.engine.train import SignSGD, outputs, tune, unstack
from laconic.formats import Format, Params, Quantized

# How far float32 may take a value that lies half a step from its code.
_ROUNDING = 1 + 1e-4


class AutoRound(QuantizingStage, BlockStage):
    """iters: steps a block. batch_size: samples a step. lr: largest move of V a step (1 / iters when not given). clip:
    tune ranges as well. asymmetric: aim at the original model's output, rather than at what the uncompressed block
    makes of the compressed model's activations."""

    method: Literal["autoround"] = "autoround"
    iters: int = Field(200, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float | None = Field(None, gt=0)
    clip: bool = True
    asymmetric: bool = True

    @property
    def cross(self) -> bool:
        return self.asymmetric

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        fmt = self.result.weights
        names = [n for tap in block.targeted_taps() for n in stacks(block.module, block.targets(tap), self.result)]
        tuned = {n: _Tuned.start(fmt, stacked(block.module, n)) for n in names}
        targets = block.original_output.hidden if block.original_output else outputs(block)

        def weights() -> Mapping[str, Tensor]:
            made: dict[str, Tensor] = {}
            for linears, parts in tuned.items():
                made |= unstack(block.module, linears, parts.weight(fmt, block.dtype).to(block.dtype))
            return made

        def clamp() -> None:
            for parts in tuned.values():
                parts.clamp()

        ranges = [r for t in tuned.values() for r in (t.low, t.high)] if self.clip else []
        optimizer = SignSGD([*(t.V for t in tuned.values()), *ranges], lr=self.lr or 1 / self.iters)
        before, after = tune(
            block,
            weights,
            optimizer,
            targets,
            iters=self.iters,
            batch_size=self.batch_size,
            acts=self.result.input_activations if not self.static else None,
            after_step=clamp,
        )
        notes = {"loss_before": before, "loss_after": after}
        return {n: Outcome(t.quantized(fmt, block.dtype), notes) for n, t in tuned.items()}


@dataclass(frozen=True)
class _Tuned:
    """Some stacked linears. W: (out, in). V: in tiles (..., n). Of each tile (...): lo, hi, its range; low, high, how
    much of either end is covered."""

    W: Tensor
    V: Tensor
    lo: Tensor
    hi: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def start(cls, fmt: Format, W: Tensor) -> _Tuned:
        """Round to nearest over the whole range."""
        tiles = fmt.tiling.split(W)
        lo, hi = tiles.amin(-1), tiles.amax(-1)
        V, low, high = (torch.zeros_like(tiles), torch.ones_like(lo), torch.ones_like(hi))
        return cls(W, V.requires_grad_(), lo, hi, low.requires_grad_(), high.requires_grad_())

    def clamp(self) -> None:
        """Keep V within half a step to either side, and ranges within the tile's own."""
        self.V.data.clamp_(-0.5, 0.5)
        self.low.data.clamp_(0.1, 1)
        self.high.data.clamp_(0.1, 1)

    def params(self, fmt: Format, dtype: torch.dtype) -> Params:
        """As they will be stored."""
        with torch.no_grad():
            lo, hi = self.lo * self.low, self.hi * self.high
            shared = fmt.shared(lo, hi)
            return {**fmt.from_range(lo, hi, dtype, shared), **shared}

    def weight(self, fmt: Format, dtype: torch.dtype) -> Tensor:
        """The rounded weight, differentiable in V, low and high through the rounding."""
        span = _span(fmt, self.lo * self.low, self.hi * self.high)
        params = self.params(fmt, dtype)
        rounded: Tensor = _Round.apply(fmt.tiling.split(self.W), self.V, span, fmt, params)  # type: ignore[no-untyped-call]
        return fmt.tiling.join(rounded, self.W.shape)

    def quantized(self, fmt: Format, dtype: torch.dtype) -> Quantized:
        """Codes and parameters, as they stand."""
        params = self.params(fmt, dtype)
        with torch.no_grad():
            shifted = fmt.tiling.split(self.W) + self.V * fmt.unit(params).unsqueeze(-1)
            codes = fmt.tiling.join(fmt.encode_tiles(shifted, params), self.W.shape)
        return Quantized(fmt, codes, params)


def _span(fmt: Format, lo: Tensor, hi: Tensor) -> Tensor:
    """What a grid's scale is proportional to."""
    return torch.maximum(-lo, hi) if fmt.symmetric else hi.clamp(min=0) - lo.clamp(max=0)


class _Round(torch.autograd.Function):
    """Q = s c, c the rounding of u = W / s + V. Straight through the rounding, where W is not cut off: dQ/dV = s and
    dQ/ds = c - W / s; where it is cut off, 0 and c. s goes with the span of the grid."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, V: Tensor, span: Tensor, fmt: Format, params: Params) -> Tensor:
        s = fmt.unit(params).unsqueeze(-1)
        u = W / s
        shifted = torch.addcmul(W, V, s)
        Q = fmt.snap_tiles(shifted, params)
        inside = (shifted.sub_(Q).abs_() <= s * (fmt.widest / 2 * _ROUNDING)).to(W.dtype)
        c = Q / s
        ctx.save_for_backward(inside, c.addcmul_(u, inside, value=-1), s, span)
        return Q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, by_scale, s, span = ctx.saved_tensors
        (grad,) = grads
        to_span = by_scale.mul_(grad).sum(-1) * (s.squeeze(-1) / span.clamp(min=1e-30))
        return None, inside.mul_(grad).mul_(s), to_span, None, None
