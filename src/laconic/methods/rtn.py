"""Round to nearest: round every weight to its nearest code, without data; the baseline of quantization methods."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.formats import fit, quantize
from laconic.solvers.moments import Moments
from laconic.solvers.search import search_range
from laconic.stages.stage import LinearStage, Outcome, QuantizingStage


class Rtn(QuantizingStage, LinearStage):
    """observer: how a grid's range is found: `minmax`, or `mse`, the range of least squared error."""

    method: Literal["rtn"] = "rtn"
    observer: Literal["minmax", "mse"] = "minmax"

    @property
    def original_inputs(self) -> bool:
        # A static range is that of what the compressed model reads: what stands out in it must not be cut off.
        return not self.static

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        fmt = self.result.weights
        params = fit(fmt, weight, dtype) if self.observer == "minmax" else search_range(fmt, weight, dtype=dtype)
        return Outcome(quantize(fmt, weight, params))
