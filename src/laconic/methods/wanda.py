"""Wanda (Sun et al., arXiv 2306.11695): prune by weight magnitude times input norm, compared within each output row.

A weight is worth |W_ij| ||X_j||, and is compared with the others of its row (section 3). What is kept stays as it is;
or is moved to what comes closest to the row as it was, exactly (`update`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.solvers.masks import StackedLinear, keep_mask_of_stack
from laconic.solvers.moments import Moments
from laconic.solvers.prune import least_squares
from laconic.stages.pruning import PruningStage
from laconic.stages.stage import Outcome


class Wanda(PruningStage):
    """update: give the kept weights of each row the values of least squared output error. dampening_frac: share of the
    Hessian's mean diagonal added to it for that. true_sequential: observe each linear after the earlier ones of its
    block are pruned."""

    method: Literal["wanda"] = "wanda"
    update: bool = False
    dampening_frac: float = Field(0.01, gt=0, le=1)
    true_sequential: bool = True

    @property
    def gram(self) -> bool:
        return self.update

    @property
    def observes(self) -> bool:
        return True

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def prune(
        self, weight: Tensor, parts: Sequence[StackedLinear], moments: Moments | None, dtype: torch.dtype
    ) -> Outcome:
        assert moments is not None
        keep = keep_mask_of_stack(weight.square() * moments.energy, parts, self.structure, "row") & (weight != 0)
        if not self.update:
            return Outcome(weight * keep)
        assert moments.H is not None
        return Outcome(least_squares(weight, keep, moments.H, self.dampening_frac).to(dtype).float())
