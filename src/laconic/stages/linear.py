"""Stages that treat weights: their targets, and the contract of those that treat linears one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import Quantized, ScalarFormat
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import Scheme
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.stages.stage import Scope, Stage
from laconic.stages.survey import Figures, SurveyedBlock
from laconic.stages.targets import Patterns


class WeightStage(Stage):
    """A stage that changes or quantizes weights.

    Attributes:
        targets: `Linear` (every linear in the decoder blocks), `lm_head` (the head), `Embedding` (the input
            embeddings), full names, or `re:` and a pattern for full names of linears.
        ignore: linears that are left out, in the same way.
    """

    stacks_linears: ClassVar[bool] = True
    """Whether linears that read one input may be compressed as the rows of one matrix."""

    targets: Patterns = Field(("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)

    @property
    def quantizes(self) -> bool:
        """Whether the stage leaves codes; otherwise it leaves dense weights."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the stage makes weights zero."""
        return False

    def survey(self, block: SurveyedBlock) -> Figures:
        """Measure one block of the original model; a stage whose needs declare `survey` implements it.

        Args:
            block: the block, with the linears that the stage treats.

        Returns:
            Figures of these linears, by name within the block.
        """
        raise TypeError(f"{type(self).__name__}.needs declares survey; implement survey(self, block), or leave it out")

    def allocate(self, blocks: Sequence[Figures], sizes: Mapping[str, int]) -> Mapping[str, float]:
        """Return the share of weights to remove from linears, by full name, once all blocks are surveyed.

        Linears without a share, as all of them here, keep that of the recipe.

        Args:
            blocks: figures of each block in which the stage treats a linear, by the linear's full name.
            sizes: number of weights of each linear, by full name.
        """
        return {}


@dataclass(frozen=True)
class LinearTask:
    """Linears that a stage compresses together, as the rows of one matrix.

    Attributes:
        weight: (out, in) float32, the rows of all of them.
        scheme: how they will be stored, by the plan; None for a stage that leaves dense weights.
        moments: statistics of their common input, as far as the stage needs any.
        dtype: in which parameters, and dense weights, are stored.
        parts: the rows of each linear, and for a stage that prunes the share of its weights to remove.
    """

    weight: Tensor
    scheme: Scheme | None
    moments: Moments | None
    dtype: torch.dtype
    parts: Sequence[StackedLinear] = ()

    @property
    def format(self) -> ScalarFormat:
        """The scalar format of the weights."""
        if self.scheme is None:
            raise TypeError("these linears have no scheme; derive the method from QuantizingStage")
        return as_scalar(self.scheme.weights)

    @property
    def hessian(self) -> Tensor:
        """H = E[x x^T] of the input, (in, in) float32."""
        if self.moments is None or self.moments.H is None:
            raise TypeError("no Hessian was observed; declare second_moments in the method's needs")
        return self.moments.H


@dataclass(frozen=True)
class Outcome:
    """The compressed weight of a task.

    Attributes:
        weight: codes, or a dense weight (out, in).
        notes: figures for the log.
    """

    weight: Quantized | Tensor
    notes: Mapping[str, float] = field(default_factory=dict)


class LinearStage(WeightStage):
    """A stage that treats linears one at a time."""

    scope: ClassVar[Scope] = "linear"

    @abstractmethod
    def compress(self, task: LinearTask) -> Outcome:
        """Compress the linears of one task.

        Must give the same result for the same task, and leave `task` unchanged.

        Args:
            task: the linears.

        Returns:
            Codes, or a dense weight (out, in), of all rows of the task.

        Raises:
            ValueError: if the task is unfit, such as a Hessian that cannot be factored; the message names the fix.
        """
