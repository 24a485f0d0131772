"""Stages that prune: how many weights are removed, and in which structure.

A pruned weight is a zero; no mask is stored. Every stage that quantizes keeps all zeros, whether of an earlier stage or
of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from laconic.config import Config
from laconic.solvers.masks import MaskStructure, parse_mask_structure
from laconic.stages.allocation import (
    allocate_by_errors,
    allocate_by_outliers,
    measure_errors,
    measure_outliers,
)
from laconic.stages.linear import LinearStage, LinearTask, WeightStage
from laconic.stages.stage import Needs
from laconic.stages.survey import Figures, SurveyedBlock
from laconic.stages.targets import check_patterns, matches

_DEFAULT = 0.5


class Masking(WeightStage):
    """A stage that can set weights to zero.

    Attributes:
        sparsity: share of a linear's weights to remove.
        mask_structure: `unstructured`; `N:M`, N of every M inputs remain, which fixes the sparsity; or `RxC`, tiles of
            R rows and C columns.
    """

    sparsity: float | None = Field(None, ge=0, lt=1)
    mask_structure: str = "unstructured"

    @model_validator(mode="after")
    def _check_sparsity(self) -> Masking:
        fixed = self.structure.sparsity
        if fixed is not None and self.sparsity is not None and abs(fixed - self.sparsity) > 1e-6:
            raise ValueError(
                f"mask_structure '{self.mask_structure}' is a sparsity of {fixed:g}, not {self.sparsity:g}; "
                "leave sparsity out, or choose another structure"
            )
        return self

    @cached_property
    def structure(self) -> MaskStructure:
        """The mask structure, parsed."""
        return parse_mask_structure(self.mask_structure)

    @property
    def prunes(self) -> bool:
        return self.sparsity is not None or self.mask_structure != "unstructured"

    @property
    def share(self) -> float:
        """Share of the weights to remove where no linear has a sparsity of its own."""
        if self.structure.sparsity is not None:
            return self.structure.sparsity
        return _DEFAULT if self.sparsity is None else self.sparsity

    def share_of(self, name: str) -> float:
        """Return the share of a linear's weights to remove.

        Args:
            name: full name of the linear.
        """
        return self.share

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Check that the mask structure divides a linear.

        Args:
            name: full name of the linear, for the message.
            shape: (out, in).

        Raises:
            ValueError: if it does not.
        """
        rows, columns = shape
        if columns % self.structure.width:
            raise ValueError(
                f"mask_structure '{self.mask_structure}' does not divide the {columns} inputs of {name}; "
                "use another structure there, or ignore it"
            )
        if rows % self.structure.height:
            raise ValueError(
                f"mask_structure '{self.mask_structure}' does not divide the {rows} outputs of {name}; "
                "use another structure there, or ignore it"
            )


class Protect(Config):
    """Attention heads to leave whole: those that matter most on a text.

    Attributes:
        dataset: a file, or a name on the Hub; this key and those below are as in a recipe's calibration.
        heads: share of all heads of the model.
        config: configuration of a dataset on the Hub.
        split: of a dataset on the Hub.
        num_calibration_samples: number of samples.
        max_seq_length: tokens of a sample.
        license: of the text, for the data card.
        source: of the text, for the data card.
        domain: of the text, for the data card.
    """

    dataset: str
    heads: float = Field(gt=0, lt=1)
    config: str | None = None
    split: str = "train"
    num_calibration_samples: int = Field(32, ge=1)
    max_seq_length: int = Field(512, ge=2)
    license: str | None = None
    source: str | None = None
    domain: str | None = None


class PruningStage(Masking, LinearStage):
    """A stage that prunes linears.

    Attributes:
        ratios: sparsities by pattern (a full name, or `re:`), in place of `sparsity`; the first match counts.
        allocation: sparsities of their own for blocks (`owl`) or linears (`search`), of which `sparsity` is the mean
            over all weights; computed on the original model.
        owl_m: scores above this many means of a block count as outliers.
        owl_lambda: how far a block's sparsity may be from the mean.
        protect: heads to leave whole; the other rows and columns of their linears are pruned.
    """

    ratios: Mapping[str, float] = Field(default_factory=dict)
    allocation: Literal["owl", "search"] | None = None
    owl_m: float = Field(5.0, gt=0)
    owl_lambda: float = Field(0.08, ge=0)
    protect: Protect | None = None

    @field_validator("ratios")
    @classmethod
    def _shares(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        check_patterns(tuple(value))
        for pattern, share in value.items():
            if not 0 <= share < 1:
                raise ValueError(f"the sparsity of '{pattern}' should be at least 0 and less than 1, not {share:g}")
        return value

    @model_validator(mode="after")
    def _check_allocation(self) -> PruningStage:
        fixed = self.structure.sparsity is not None
        if fixed and (self.ratios or self.allocation):
            key = "ratios" if self.ratios else "allocation"
            raise ValueError(
                f"{key} gives linears sparsities of their own, and mask_structure '{self.mask_structure}' fixes that "
                "of all; leave one of the two out"
            )
        if self.ratios and self.allocation:
            raise ValueError("ratios and allocation both set the sparsity of each linear; leave one of them out")
        if self.allocation == "owl" and 2 * self.owl_lambda > min(self.share, 1 - self.share):
            raise ValueError(
                f"owl_lambda {self.owl_lambda:g} may take a block's sparsity {2 * self.owl_lambda:g} from the mean, "
                f"{self.share:g}, and so out of 0 to 1; lower it"
            )
        return self

    @property
    def prunes(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        survey = self.allocation is not None
        return Needs(
            survey=survey,
            survey_second_moments=self.allocation == "search",
            reason=f"allocation: {self.allocation}" if survey else "",
        )

    def survey(self, block: SurveyedBlock) -> Figures:
        if self.allocation == "owl":
            return measure_outliers(block, self.owl_m)
        return measure_errors(block, self.share, self._prune)

    def allocate(self, blocks: Sequence[Figures], sizes: Mapping[str, int]) -> Mapping[str, float]:
        if self.allocation == "owl":
            return allocate_by_outliers(blocks, sizes, self.share, self.owl_lambda)
        return allocate_by_errors(blocks, sizes, self.share)

    def _prune(self, task: LinearTask) -> Tensor:
        weight = self.compress(task).weight
        assert isinstance(weight, Tensor)
        return weight

    def share_of(self, name: str) -> float:
        return next((share for pattern, share in self.ratios.items() if matches(name, [pattern])), self.share)
