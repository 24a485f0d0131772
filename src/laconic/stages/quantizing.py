"""Stages that quantize: the scheme, its variations, and the 16-bit side tensors that every method may add."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from laconic.formats import Format, ScalarFormat, schemes
from laconic.formats.schemes import Scheme
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearTask, WeightStage
from laconic.stages.stage import Needs


class QuantizingStage(WeightStage):
    """A stage that leaves codes.

    The scheme that it asks for is only a proposal to the plan: methods take the scheme of a linear from their task.
    Side tensors are the same for every method (`walk.side_tensors`).

    Attributes:
        scheme: name of a preset; the next four keys vary it.
        group_size: columns that share a scale; -1 for one scale a channel.
        symmetric: whether the weights' grid has no zero point.
        strategy: of the weights' scales.
        dynamic: whether activations are scaled by each input, or by calibration.
        outlier_ratio: share of the input columns in 16 bit: those of largest activations in calibration.
        low_rank: rank of a 16-bit product that is fitted to the quantization error.
    """

    formats: ClassVar[tuple[type[Format], ...]] = (ScalarFormat,)
    """Kinds of format that the method can choose codes for."""

    scheme: str
    group_size: int | None = None
    symmetric: bool | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    dynamic: bool | None = None
    outlier_ratio: float | None = Field(None, ge=0, lt=1)
    low_rank: int = Field(0, ge=0)

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in schemes.PRESETS:
            near = get_close_matches(value.upper(), schemes.PRESETS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(schemes.PRESETS)}"
            raise ValueError(f"unknown scheme '{value}': {hint}")
        return value

    @model_validator(mode="after")
    def _buildable(self) -> QuantizingStage:
        weights = self.proposed_scheme.weights
        if not isinstance(weights, self.formats):
            raise ValueError(f"{self.method} cannot choose codes of {weights.title}; use another method or scheme")
        return self

    @property
    def quantizes(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        if self.outlier_ratio:
            return Needs(ranges=True, reason="outlier_ratio")
        return Needs(ranges=True, reason="static activations") if self.static else Needs()

    @property
    def static(self) -> bool:
        """Whether activations are quantized with parameters from calibration."""
        acts = self.proposed_scheme.input_activations
        return bool(acts and acts.calibrated)

    @cached_property
    def proposed_scheme(self) -> Scheme:
        """The scheme that the keys describe, without side tensors."""
        return schemes.scheme(
            self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            strategy=self.strategy,
            dynamic=self.dynamic,
        )

    def scheme_for(self, shape: tuple[int, int]) -> Scheme:
        """Return the scheme that the stage proposes for a linear of shape (out, in), side tensors included."""
        return replace(self.proposed_scheme, outlier_columns=self.count_outliers(shape[1]), rank=self.low_rank)

    def count_outliers(self, columns: int) -> int | None:
        """Return how many of so many input columns stay in 16 bit; None if that depends on the calibration set."""
        return min(columns - 1, max(1, round(self.outlier_ratio * columns))) if self.outlier_ratio else 0

    def outlier_columns(self, scheme: Scheme, moments: Moments | None) -> Tensor:
        """Choose the input columns that stay in 16 bit.

        Those of largest energy; of largest magnitude where magnitudes set the grid of the activations.

        Args:
            scheme: of the linear.
            moments: of its input.

        Returns:
            Their indices (k,), ascending.
        """
        if not self.outlier_ratio:
            return torch.empty(0, dtype=torch.int64)
        assert moments is not None
        by_energy = moments.H is not None and scheme.input_activations is None
        size = moments.H.diagonal() if by_energy and moments.H is not None else moments.peak
        # A stable sort breaks ties the same way on every machine.
        return size.argsort(descending=True, stable=True)[: self.count_outliers(len(size))].sort().values

    def target(self, task: LinearTask) -> Tensor:
        """Return the real weight (out, in) that rounding should come close to.

        Beside columns that are not rounded, `compress` gets this weight, and moments without cross moments.
        """
        return task.weight
