"""LLM.int8 (Dettmers et al., arXiv 2208.07339): int8 weights and activations, with outlier input columns in 16 bit.

Weights have one scale per output row and activations one per token, both from the largest magnitude (vector-wise
quantization, section 3.1). Columns whose activations reach a threshold are excluded, and multiplied in 16 bit
(mixed-precision decomposition, section 3.2). The paper chooses them in every batch; here calibration chooses them once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs


class LlmInt8(QuantizingStage, LinearStage):
    """Int8 by int8, outlier columns in 16 bit.

    Attributes:
        threshold: input columns that reach this magnitude in calibration stay in 16 bit.
        outlier_ratio: in place of the threshold, the share of columns that stay.
    """

    example: ClassVar = {"threshold": 2.5}

    method: Literal["llm_int8"] = "llm_int8"
    scheme: Literal["W8A8"] = "W8A8"
    threshold: float = Field(6.0, gt=0, allow_inf_nan=False)

    @property
    def needs(self) -> Needs:
        # The small errors of int8 do not change which channels are outliers, so one pass per block is enough.
        return Needs(ranges=True, sequential=False, original_activations=True, reason=self.method)

    def count_outliers(self, columns: int) -> int | None:
        return None if self.outlier_ratio is None else super().count_outliers(columns)

    def outlier_columns(self, scheme: Scheme, moments: Moments | None) -> Tensor:
        if scheme.outlier_columns is not None:
            return super().outlier_columns(scheme, moments)
        assert moments is not None
        return (moments.peak >= self.threshold).nonzero().flatten()

    def compress(self, task: LinearTask) -> Outcome:
        # The paper's grid, 127 steps up to the largest magnitude, is the stored grid without its lowest code.
        fmt, grid = task.format, task.format.for_activations()
        params = grid.fit(task.weight, task.dtype)
        return Outcome(Quantized.scalar(fmt, grid.encode(task.weight, params), params))
