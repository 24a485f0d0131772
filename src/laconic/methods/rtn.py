"""Round to nearest: round every weight to its nearest code, without data; the baseline of quantization methods."""

from __future__ import annotations

from typing import ClassVar, Literal

from laconic.formats import quantize
from laconic.solvers.search import search_range
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs


class Rtn(QuantizingStage, LinearStage):
    """Round to nearest.

    Attributes:
        observer: how a grid's range is chosen: `minmax`, or `mse` for the range of least squared error.
    """

    example: ClassVar = {"scheme": "W4A16", "group_size": 32}

    method: Literal["rtn"] = "rtn"
    observer: Literal["minmax", "mse"] = "minmax"

    @property
    def needs(self) -> Needs:
        return Needs(original_activations=True)

    def compress(self, task: LinearTask) -> Outcome:
        fmt, W = task.format, task.weight
        params = fmt.fit(W, task.dtype) if self.observer == "minmax" else search_range(fmt, W, dtype=task.dtype)
        return Outcome(quantize(fmt, W, params))
