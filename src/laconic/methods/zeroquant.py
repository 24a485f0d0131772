"""ZeroQuant (Yao et al., arXiv 2206.01861): group-wise weights, token-wise activations, block-by-block distillation.

Weights are rounded to nearest, after each block, as it will be rounded, was taught by its own uncompressed self: its
weights are tuned so that for the compressed model's activations it puts out what the original block would (section
3.3). Only one block and the calibration set are needed; there are no labels. Without the teaching this is `rtn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import fit, quantize
from laconic.stages.block import Block, stacked, stacks
from laconic.stages.stage import BlockStage, Outcome, QuantizingStage
from laconic.train.block_tuning import hold, outputs, rounded_through, tune, unstack


class ZeroQuant(QuantizingStage, BlockStage):
    """iters: steps a block. batch_size: samples a step. lr: Adam's, as a share of the weights' root mean square."""

    method: Literal["zeroquant"] = "zeroquant"
    scheme: str = "W4A8"
    iters: int = Field(100, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float = Field(2e-3, gt=0)

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        fmt = self.result.weights
        names = [n for tap in block.targeted_taps() for n in stacks(block.module, block.targets(tap), self.result)]
        # Zeros stay zeros: what a mask put there is no error to be taught.
        tuned = {n: hold(W.requires_grad_(), W == 0) for n in names for W in [stacked(block.module, n)]}

        def weights() -> Mapping[str, Tensor]:
            made: dict[str, Tensor] = {}
            for linears, W in tuned.items():
                with torch.no_grad():
                    nearest = quantize(fmt, W, fit(fmt, W, block.dtype)).decode()
                made |= unstack(block.module, linears, rounded_through(W, nearest).to(block.dtype))
            return made

        optimizers = [
            torch.optim.Adam([W], lr=self.lr * float(W.detach().square().mean().sqrt())) for W in tuned.values()
        ]
        before, after, fell = tune(
            block,
            weights,
            optimizers,
            outputs(block),
            iters=self.iters,
            batch_size=self.batch_size,
            acts=self.result.input_activations if not self.static else None,
        )
        notes = {"loss_before": before, "loss_after": after if fell else before}
        made = {n: W.detach() if fell else stacked(block.module, n) for n, W in tuned.items()}
        return {n: Outcome(quantize(fmt, W, fit(fmt, W, block.dtype)), notes) for n, W in made.items()}
