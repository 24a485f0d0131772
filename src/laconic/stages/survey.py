"""The input of a survey: a block of the original model, measured by a stage before anything is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laconic.solvers.moments import Moments

Figures = dict[str, dict[str, Any]]
"""Figures of linears, by the linear's name: numbers, or lists of numbers, which are written to `survey.json`."""


@dataclass(frozen=True)
class SurveyedBlock:
    """One block of the original model.

    Attributes:
        linears: the linears that the stage treats, by name within the block; their weights are (out, in).
        moments: statistics of their inputs, by the same names; with the Hessian if the stage needs
            `survey_second_moments`.
        output_change: returns how far the block's output moves if some linears have other weights (out, in), given by
            name: the squared change of a token's output relative to the output, mean over a sample of tokens.
    """

    linears: Mapping[str, nn.Linear]
    moments: Mapping[str, Moments]
    output_change: Callable[[Mapping[str, Tensor]], float]
