"""ZeroQuant (Yao et al., arXiv 2206.01861): group-wise weights, token-wise activations, block-by-block distillation.

Each block is distilled from its uncompressed self, then its weights are rounded to nearest: they are tuned under
rounding so that on the compressed model's activations the block's output matches that of the uncompressed block
(section 3.3). Only one block and the calibration set are in memory; there are no labels. Without the distillation this
is `rtn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import quantize
from laconic.stages.block import Block, BlockStage, Stack, stacked
from laconic.stages.linear import Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs
from laconic.train.block_tuning import block_output, freeze_where, straight_through, tune, unstack


class ZeroQuant(QuantizingStage, BlockStage):
    """Distil each block before its weights are rounded to nearest.

    Attributes:
        iters: steps a block.
        batch_size: samples a step.
        lr: Adam's learning rate, as a share of the weights' root mean square.
    """

    example: ClassVar = {"scheme": "W4A8", "group_size": 32, "iters": 3, "batch_size": 2}

    method: Literal["zeroquant"] = "zeroquant"
    scheme: str = "W4A8"
    iters: int = Field(100, ge=1)
    batch_size: int = Field(8, ge=1)
    lr: float = Field(2e-3, gt=0)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, activations=True)

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        tuned: dict[Stack, Tensor] = {}
        for stack in [stack for tap in block.targeted_taps() for stack in block.stacks(tap)]:
            W = stacked(block.module, stack.linears).requires_grad_()
            # Zeros stay zeros: pruned weights are not trained.
            tuned[stack] = freeze_where(W, W == 0)

        def weights() -> Mapping[str, Tensor]:
            by_name: dict[str, Tensor] = {}
            for stack, W in tuned.items():
                with torch.no_grad():
                    nearest = quantize(stack.format, W, stack.format.fit(W, block.dtype)).decode()
                by_name |= unstack(block.module, stack.linears, straight_through(W, nearest).to(block.dtype))
            return by_name

        optimizers = [
            torch.optim.Adam([W], lr=self.lr * float(W.detach().square().mean().sqrt())) for W in tuned.values()
        ]
        result = tune(
            block,
            weights,
            optimizers,
            block_output(block),
            iters=self.iters,
            batch_size=self.batch_size,
            activations=block.dynamic_activations(),
        )
        final = {s: W.detach() if result.improved else stacked(block.module, s.linears) for s, W in tuned.items()}
        return {
            s.linears: Outcome(quantize(s.format, W, s.format.fit(W, block.dtype)), result.notes)
            for s, W in final.items()
        }
