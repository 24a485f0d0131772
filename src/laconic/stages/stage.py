"""A stage: how values are chosen. A frozen config, and one function at the smallest scope that works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from laconic.config import Config
from laconic.formats import Quantized
from laconic.formats import schemes as scheme_presets
from laconic.formats.schemes import Scheme
from laconic.solvers.moments import Moments
from laconic.stages.targets import Patterns

if TYPE_CHECKING:
    from laconic.stages.block import Block
    from laconic.structure.anatomy import Tap
    from laconic.structure.links import Link


@dataclass(frozen=True)
class Outcome:
    """What a stage made of a weight: codes, or a dense weight of the same shape. notes: figures for the log."""

    weight: Quantized | Tensor
    notes: Mapping[str, float] = field(default_factory=dict)


class Stage(Config):
    """What every stage's config has. targets: `Linear` (every linear in the decoder blocks), a full name, or `re:`
    and a pattern for full names; the head is meant only by its name. ignore: the same, taken away."""

    scope: ClassVar[Literal["linear", "block"]]
    method: str
    targets: Patterns = Field(("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)

    @property
    def result(self) -> Scheme | None:
        """The scheme of what comes out, None when that is a dense weight."""
        return None

    def result_for(self, shape: tuple[int, int]) -> Scheme | None:
        """The same for a linear of shape (out, in), with what is kept beside its codes."""
        return self.result

    @property
    def ranges(self) -> str | None:
        """What needs to know the range of every input, if anything does, though `compress` itself may need no data."""
        return "static activations" if self.static else None

    @property
    def observes(self) -> bool:
        """Whether the stage needs calibration activations."""
        return bool(self.ranges)

    @property
    def needing(self) -> str:
        """What of this stage needs calibration activations, if anything does."""
        return self.ranges or self.method

    @property
    def prunes(self) -> bool:
        """Whether the stage makes weights zero."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether the original model has to be looked at from end to end before any of it is changed."""
        return False

    @property
    def cross(self) -> bool:
        """Whether the stage also needs the original model's activations, beside those of the compressed one."""
        return False

    @property
    def original_inputs(self) -> bool:
        """Whether the stage is content with the original model's activations alone."""
        return False

    @property
    def static(self) -> bool:
        """Whether activations are rounded on a scale fixed by calibration."""
        acts = self.result.input_activations if self.result else None
        return bool(acts and acts.calibrated)


class LinearStage(Stage):
    """A stage that treats linears one at a time: `compress(weight, moments) -> Outcome`."""

    scope: ClassVar[Literal["linear", "block"]] = "linear"

    @property
    def gram(self) -> bool:
        """Whether `compress` needs the second moments of the input."""
        return False

    @property
    def observes(self) -> bool:
        return self.gram or self.cross or bool(self.ranges)

    @property
    def sequential(self) -> bool:
        """Whether linears of a block are observed after the earlier ones of the same block are compressed."""
        return True

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        """weight: (out, in) float32, the rows of every linear on one tap. dtype: in which parameters are stored."""
        raise NotImplementedError


class BlockStage(Stage):
    """A stage that treats a decoder block as a whole: `compress(block) -> outcomes`."""

    scope: ClassVar[Literal["linear", "block"]] = "block"

    @property
    def observes(self) -> bool:
        return True

    @property
    def links(self) -> bool:
        """Whether the stage moves scales between linears and what feeds them."""
        return False

    def check(self, taps: Mapping[Tap, int], links: Mapping[Tap, Link]) -> None:
        """taps: those of a block with targeted linears, and how wide their input is.

        Raises: ValueError when the stage cannot work on these taps.
        """

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        """Change the block's dense weights in place, keeping what it computes; and say what becomes of its targeted
        linears. By names within the block: linears on one tap whose rows are stacked have one outcome."""
        raise NotImplementedError


class QuantizingStage(Stage):
    """A stage that quantizes. scheme: a preset's name; the other keys vary the preset. Kept beside the codes in 16 bit,
    whatever the method (`walk.beside`): outlier_ratio, the share of input columns, the loudest in calibration;
    low_rank, the rank of a product fitted to what rounding left over."""

    scheme: str
    group_size: int | None = None
    symmetric: bool | None = None
    strategy: Literal["tensor", "channel", "group"] | None = None
    dynamic: bool | None = None
    outlier_ratio: float | None = Field(None, ge=0, lt=1)
    low_rank: int = Field(0, ge=0)

    @property
    def ranges(self) -> str | None:
        return "outlier_ratio" if self.outlier_ratio else super().ranges

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str) -> str:
        from difflib import get_close_matches

        if value not in scheme_presets.PRESETS:
            near = get_close_matches(value.upper(), scheme_presets.PRESETS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(scheme_presets.PRESETS)}"
            raise ValueError(f"unknown scheme '{value}': {hint}")
        return value

    @model_validator(mode="after")
    def _buildable(self) -> QuantizingStage:
        _ = self.result
        return self

    @cached_property
    def result(self) -> Scheme:
        return scheme_presets.scheme(
            self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            strategy=self.strategy,
            dynamic=self.dynamic,
        )

    def result_for(self, shape: tuple[int, int]) -> Scheme:
        return replace(self.result, outlier_columns=self.count_outliers(shape[1]), rank=self.low_rank)

    def count_outliers(self, columns: int) -> int | None:
        """How many of so many input columns are kept in 16 bit; None when that depends on the calibration set."""
        return min(columns - 1, max(1, round(self.outlier_ratio * columns))) if self.outlier_ratio else 0

    def outliers(self, moments: Moments | None) -> Tensor:
        """Which input columns are kept in 16 bit: the loudest, by energy, or by peak where peaks set the grid of the
        activations. Returns: their indices (k,), rising."""
        if not self.outlier_ratio:
            return torch.empty(0, dtype=torch.int64)
        assert moments is not None
        energy = moments.H is not None and self.result.input_activations is None
        loud = moments.H.diagonal() if energy and moments.H is not None else moments.peak
        # Sorted and stable, so that ties go one way on every machine.
        return loud.argsort(descending=True, stable=True)[: self.count_outliers(len(loud))].sort().values

    def target(self, weight: Tensor, moments: Moments | None) -> Tensor:
        """The real weight that rounding is to come close to: (out, in). Beside columns that are not rounded, `compress`
        gets this, and moments without D."""
        return weight
