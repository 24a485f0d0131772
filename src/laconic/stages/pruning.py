"""A stage that prunes: how many weights go, and in which structure.

A pruned weight is a zero, and nothing else tells of it: every stage that quantizes keeps the zeros it is given, whether
a stage before it made them or the checkpoint came with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from laconic.config import Config
from laconic.solvers.masks import MaskStructure, StackedLinear, parse_mask_structure, single_linear
from laconic.solvers.moments import Moments
from laconic.stages.stage import LinearStage, Outcome, Stage
from laconic.stages.targets import check_patterns, matches

_DEFAULT = 0.5


class Masking(Stage):
    """sparsity: the share of a linear's weights that becomes zero. mask_structure: `unstructured`; `N:M`, N kept of
    every M inputs, which is a sparsity in itself; or `RxC`, tiles of R rows and C columns."""

    sparsity: float | None = Field(None, ge=0, lt=1)
    mask_structure: str = "unstructured"

    @model_validator(mode="after")
    def _agree(self) -> Masking:
        own = self.structure.sparsity
        if own is not None and self.sparsity is not None and abs(own - self.sparsity) > 1e-6:
            raise ValueError(
                f"mask_structure '{self.mask_structure}' is a sparsity of {own:g}, not {self.sparsity:g}; "
                "leave sparsity out, or choose another structure"
            )
        return self

    @cached_property
    def structure(self) -> MaskStructure:
        """What goes together."""
        return parse_mask_structure(self.mask_structure)

    @property
    def prunes(self) -> bool:
        return self.sparsity is not None or self.mask_structure != "unstructured"

    @property
    def share(self) -> float:
        """The share that goes, of a linear of which nothing else is said."""
        if self.structure.sparsity is not None:
            return self.structure.sparsity
        return _DEFAULT if self.sparsity is None else self.sparsity

    def share_of(self, name: str) -> float:
        """The share that goes of the linear of this full name."""
        return self.share

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raises: ValueError when the structure does not divide a linear of shape (out, in)."""
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

    def prune(
        self, weight: Tensor, parts: Sequence[StackedLinear], moments: Moments | None, dtype: torch.dtype
    ) -> Outcome:
        """weight: (out, in) float32, the rows of every linear on one tap. parts: of which linear they are, and what of
        it goes. dtype: of what is stored, a dense weight (float32) having no other values. What is zero in `weight`
        stays so."""
        raise NotImplementedError


class Protect(Config):
    """heads: the share of all attention heads that is left whole: those that matter most on this text. dataset, config,
    split, num_calibration_samples, max_seq_length, license, source, domain: as in a recipe's calibration."""

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
    """ratios: sparsities of linears by pattern (a full name, or `re:`), in place of `sparsity`; the first that fits
    counts. allocation: sparsities of their own for blocks (`owl`) or linears (`search`), of which `sparsity` is the
    mean over all weights; found on the original model. owl_m, owl_lambda: what counts as an outlier, in means of all
    scores of a block; and how far a block's sparsity may be from the mean. protect: heads that are left whole; what is
    left of their linears is pruned as ever."""

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
    def _free_to_differ(self) -> PruningStage:
        fixed = self.structure.sparsity is not None
        if fixed and (self.ratios or self.allocation):
            key = "ratios" if self.ratios else "allocation"
            raise ValueError(
                f"{key} gives linears sparsities of their own, and mask_structure '{self.mask_structure}' fixes that "
                "of all; leave one of the two out"
            )
        if self.ratios and self.allocation:
            raise ValueError("ratios and allocation both say what each linear loses; leave one of them out")
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
    def surveys(self) -> bool:
        return self.allocation is not None

    @property
    def needing(self) -> str:
        return self.method if self.observes else f"allocation: {self.allocation}"

    def share_of(self, name: str) -> float:
        return next((share for pattern, share in self.ratios.items() if matches(name, [pattern])), self.share)

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        return self.prune(weight, single_linear(weight, self.share), moments, dtype)
