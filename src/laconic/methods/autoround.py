"""AutoRound (Cheng et al., arXiv 2309.05516): rounding and clipping tuned by signed gradient descent, block by block.

Q(W) = s * clip(round(W / s + V) + z): V in [-0.5, 0.5] decides which way a weight is rounded, a and b how much of each
group's range the grid covers; all three move by the sign of their gradient (eq. 3-5) so that the block's output on the
compressed model's activations comes near to the original model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.engine.block import Block, stacked, stacks
from laconic.engine.stage import BlockStage, Outcome, QuantizingStage
from laconic.engine.train import SignSGD, outputs, tune, unstack
from laconic.formats import Format, Params, Quantized, fit
from laconic.model.anatomy import Tap, linear_at
from laconic.solvers.grid import swept
from laconic.solvers.moments import Moments
from laconic.solvers.search import search_range


class AutoRound(QuantizingStage, BlockStage):
    """iters: steps a block. batch_size: samples a step. lr: largest move of V a step (1 / iters when not given). clip:
    tune ranges as well. start: where tuning begins: rounding to nearest over the whole range (`minmax`, the paper's),
    over the range of least squared error (`mse`), or what GPTQ would choose (`gptq`). asymmetric: aim at the original
    model's output, rather than at what the uncompressed block makes of the compressed model's activations."""

    method: Literal["autoround"] = "autoround"
    iters: int = Field(200, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float | None = Field(None, gt=0)
    clip: bool = True
    start: Literal["minmax", "mse", "gptq"] = "gptq"
    asymmetric: bool = True

    @property
    def cross(self) -> bool:
        return self.asymmetric

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        fmt = self.result.weights
        tuned = dict(self._begin(block))
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

    def _begin(self, block: Block) -> Iterator[tuple[tuple[str, ...], _Tuned]]:
        fmt, taps = self.result.weights, block.targeted_taps()
        seen = {} if self.start == "minmax" else _moments(block, taps)
        for tap in taps:
            for names in stacks(block.module, block.targets(tap), self.result):
                W = stacked(block.module, names)
                if tap not in seen:
                    yield names, _Tuned.start(fmt, W, fit(fmt, W, block.dtype))
                    continue
                H = seen[tap].mean()
                params = search_range(fmt, W, H.diagonal(), dtype=block.dtype)
                if self.start == "gptq":
                    codes = swept(fmt, W, H, params)
                    yield names, _Tuned.start(fmt, W, params, codes)
                else:
                    yield names, _Tuned.start(fmt, W, params)


def _moments(block: Block, taps: Sequence[Tap]) -> dict[Tap, Moments]:
    widths = {tap: linear_at(block.module, tap.linears[0]).in_features for tap in taps}
    seen = {tap: Moments(width, block.device) for tap, width in widths.items()}
    for tap, x in block.inputs(taps):
        seen[tap].add(x)
    return {tap: found.finish() for tap, found in seen.items()}


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
    def start(cls, fmt: Format, W: Tensor, params: Params, codes: Tensor | None = None) -> _Tuned:
        """Round to nearest under these parameters, or to these codes."""
        tiles = fmt.tiling.split(W)
        if codes is not None:
            # Where a code is not the nearest, the weight is brought to the edge of what would be rounded to it.
            values = fmt.decode_tiles(fmt.tiling.split(codes), params)
            half = 0.49 * fmt.unit(params).unsqueeze(-1)
            tiles = torch.clamp(tiles, values - half, values + half)
        lo, hi = fmt.range_of(params)
        V, low, high = torch.zeros_like(tiles), torch.ones_like(lo), torch.ones_like(hi)
        W = fmt.tiling.join(tiles, W.shape)
        return cls(W, V.requires_grad_(), lo, hi, low.requires_grad_(), high.requires_grad_())

    def clamp(self) -> None:
        """Keep V within half a step to either side, and ranges in reason."""
        self.V.data.clamp_(-0.5, 0.5)
        self.low.data.clamp_(0.1, 2)
        self.high.data.clamp_(0.1, 2)

    def params(self, fmt: Format, dtype: torch.dtype) -> Params:
        """As they will be stored."""
        with torch.no_grad():
            lo, hi = self.lo * self.low, self.hi * self.high
            shared = fmt.shared(lo, hi)
            return {**fmt.from_range(lo, hi, dtype, shared), **shared}

    def weight(self, fmt: Format, dtype: torch.dtype) -> Tensor:
        """The rounded weight, differentiable in V, low and high through the rounding."""
        params = self.params(fmt, dtype)
        scale = fmt.unit(params)
        # The stored scale in value; in gradient, the share of the range that low and high cover.
        span = _span(fmt, self.lo * self.low, self.hi * self.high)
        s = scale * (1 + (span - span.detach()) / span.detach().clamp(min=1e-30))
        u = fmt.tiling.split(self.W) / s.unsqueeze(-1) + self.V
        with torch.no_grad():
            c = fmt.decode_tiles(fmt.encode_tiles(u * scale.unsqueeze(-1), params), params) / scale.unsqueeze(-1)
            inside = ((u - c).abs() <= 1).float()
        values = (c + inside * (u - u.detach())) * s.unsqueeze(-1)
        return fmt.tiling.join(values, self.W.shape)

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
