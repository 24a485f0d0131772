"""LLM.int8 (Dettmers et al., arXiv 2208.07339): int8 weights and activations, with outlier input columns in 16 bit.

Weights have one scale an output row and activations one a token, both from the largest magnitude (vector-wise
quantization, section 3.1); columns whose activations reach a threshold are taken out of both, and multiplied in 16 bit
(mixed-precision decomposition, section 3.2). The paper looks for them in every batch; here calibration finds them once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import Quantized, encode, fit
from laconic.formats.int_affine import IntAffine
from laconic.solvers.moments import Moments
from laconic.stages.stage import LinearStage, Outcome, QuantizingStage


class LlmInt8(QuantizingStage, LinearStage):
    """threshold: input columns that reach this magnitude in calibration stay in 16 bit. outlier_ratio: in place of the
    threshold, the share of columns that stay, the loudest."""

    method: Literal["llm_int8"] = "llm_int8"
    scheme: Literal["W8A8"] = "W8A8"
    threshold: float = Field(6.0, gt=0, allow_inf_nan=False)

    @property
    def ranges(self) -> str | None:
        return self.method

    @property
    def original_inputs(self) -> bool:
        return True

    @property
    def sequential(self) -> bool:
        # Which channels are loud does not hang on int8's small errors before them in the block: one pass is enough.
        return False

    def count_outliers(self, columns: int) -> int | None:
        return None if self.outlier_ratio is None else super().count_outliers(columns)

    def outliers(self, moments: Moments | None) -> Tensor:
        if self.outlier_ratio is not None:
            return super().outliers(moments)
        assert moments is not None
        return (moments.peak >= self.threshold).nonzero().flatten()

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        fmt = self.result.weights
        assert isinstance(fmt, IntAffine)
        # The paper's grid, 127 steps to the largest magnitude, is the stored one without its lowest code.
        grid = replace(fmt, narrow=True)
        params = fit(grid, weight, dtype)
        return Outcome(Quantized(fmt, encode(grid, weight, params), params))
