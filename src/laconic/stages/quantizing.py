"""Stages that quantize: the scheme, its variations, and the 16-bit side tensors that every method may add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator
from torch import Tensor

from laconic.formats import Format, ScalarFormat, schemes
from laconic.formats.schemes import Scheme
from laconic.formats.tiling import auto_tiling
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearTask, WeightStage
from laconic.stages.stage import Needs


def _size_or_auto(value: Any) -> Any:
    if value in (None, "auto"):
        return value
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        raise ValueError(f"should be a valid integer, or 'auto', not {value}") from None


_INTEGER = TypeAdapter(int)
GroupSize = Annotated[int | Literal["auto"], BeforeValidator(_size_or_auto)]
"""Columns that share a scale, -1 for one scale a channel, or `auto`."""


class QuantizingStage(WeightStage):
    """A stage that leaves codes.

    The scheme that it asks for is only a proposal to the plan: methods take the scheme of a linear from their task.
    Side tensors are the same for every method (`walk.side_tensors`).

    Attributes:
        scheme: name of a preset; the next four keys vary it.
        group_size: columns that share a scale; -1 for one scale a channel; `auto` for the largest of 128, 64 and 32
            that divides the inputs of a linear, else one scale a channel.
        symmetric: whether the weights' grid has no zero point.
        strategy: granularity of the weights' scales.
        dynamic: whether activations are scaled by each input, or by calibration.
        outlier_ratio: share of the input columns in 16 bit: those of largest activations in calibration.
        low_rank: rank of a 16-bit product that is fitted to the quantization error.
        rotate_inputs: whether weights and inputs are rounded after the input channels are rotated (`rotate_channels`),
            at run time (QuaRot's R4); for linears whose input no weight can rotate, such as down-projections.
    """

    formats: ClassVar[tuple[type[Format], ...]] = (ScalarFormat,)
    """Kinds of format that the method can choose codes for."""

    scheme: str
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    dynamic: bool | None = None
    outlier_ratio: float | None = Field(None, ge=0, lt=1)
    low_rank: int = Field(0, ge=0)
    rotate_inputs: bool = False

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
        self.check_scheme(self._nominal_scheme)
        return self

    def check_scheme(self, scheme: Scheme) -> None:
        """Check that the stage can make a scheme, its own or one that an allocation chooses.

        Args:
            scheme: of a linear, side tensors included.

        Raises:
            ValueError: if it cannot; the message names the fix.
        """
        if not isinstance(scheme.weights, self.formats):
            raise ValueError(
                f"{self.method} cannot choose codes of {scheme.weights.title}; use another method or scheme"
            )
        acts = scheme.input_activations
        if scheme.input_rotation and self.scope != "linear":
            raise ValueError(f"{self.method} cannot rotate inputs; use gptq or rtn, or leave rotate_inputs out")
        if scheme.input_rotation and scheme.outlier_columns != 0:
            raise ValueError("rotated inputs have no outlier columns; leave outlier_ratio or rotate_inputs out")
        if scheme.input_rotation and acts is not None and acts.calibrated:
            raise ValueError(
                "ranges of rotated inputs are not calibrated; set dynamic: true, or leave rotate_inputs out"
            )
        if scheme.outlier_columns is None and self._nominal_scheme.outlier_columns is not None:
            raise ValueError(f"{self.method} has no threshold for outlier columns; give their number")

    @property
    def quantizes(self) -> bool:
        return True

    @property
    def proposed_needs(self) -> Needs:
        return needs_with_schemes(self.needs, [self._nominal_scheme])

    @cached_property
    def proposed_scheme(self) -> Scheme:
        """The scheme that the keys describe, without side tensors; with `group_size: auto`, of the largest groups."""
        return schemes.scheme(
            self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            strategy=self.strategy,
            dynamic=self.dynamic,
        )

    def scheme_for(self, shape: tuple[int, int]) -> Scheme:
        """Return the scheme that the stage proposes for a linear, side tensors included.

        Args:
            shape: (out, in) of the linear.
        """
        scheme = replace(
            self.proposed_scheme,
            outlier_columns=self.count_outliers(shape[1]),
            rank=self.low_rank,
            input_rotation=shape[1] if self.rotate_inputs else 0,
        )
        return schemes.regroup(scheme, auto_tiling(shape[1])) if self.group_size == "auto" else scheme

    @property
    def _nominal_scheme(self) -> Scheme:
        """The proposal for a linear of any size; only whether there are outlier columns is meant, not their number."""
        return self.scheme_for((2, 2))

    def count_outliers(self, columns: int) -> int | None:
        """Return how many input columns of a linear stay in 16 bit; None if that depends on the calibration set.

        Args:
            columns: number of its input columns.
        """
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
        if not scheme.outlier_columns:
            return torch.empty(0, dtype=torch.int64)
        assert moments is not None
        by_energy = moments.H is not None and scheme.input_activations is None
        size = moments.H.diagonal() if by_energy and moments.H is not None else moments.peak
        # A stable sort breaks ties the same way on every machine.
        return size.argsort(descending=True, stable=True)[: scheme.outlier_columns].sort().values

    def target(self, task: LinearTask) -> Tensor:
        """Return the real weight (out, in) that rounding should come close to.

        Beside columns that are not rounded, `compress` gets this weight, and moments without cross moments.

        Args:
            task: the linears, with the moments of their input.
        """
        return task.weight


def needs_with_schemes(needs: Needs, schemes: Iterable[Scheme]) -> Needs:
    """Return the needs of a method, and of the schemes of its linears.

    Outlier columns and static activations need ranges. A static range is that of the compressed model's activations,
    whose outliers must not be clipped: the original model's are not enough.

    Args:
        needs: of the method.
        schemes: of the linears that it quantizes.
    """
    schemes = list(schemes)
    static = any(s.input_activations is not None and s.input_activations.calibrated for s in schemes)
    outliers = any(s.outlier_columns != 0 for s in schemes)
    if not (static or outliers):
        return needs
    return replace(
        needs,
        ranges=True,
        original_activations=needs.original_activations and not static,
        reason=needs.reason or ("outlier_ratio" if outliers else "static activations"),
    )
