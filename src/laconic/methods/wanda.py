"""Wanda (Sun et al., arXiv 2306.11695): prune by weight magnitude times input norm, compared within each output row.

The score of a weight is |W_ij| ||X_j||, compared within its row (section 3). Remaining weights are unchanged, or, with
`update`, get the values of least squared output error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from laconic.solvers.masks import keep_mask_of_stack
from laconic.solvers.prune import least_squares
from laconic.stages.linear import LinearTask, Outcome
from laconic.stages.pruning import PruningStage
from laconic.stages.stage import Needs


class Wanda(PruningStage):
    """Remove the weights of least |W_ij| ||X_j|| in each row.

    Attributes:
        update: give the remaining weights of each row the values of least squared output error.
        dampening_frac: share of the Hessian's mean diagonal added to it for the update.
        true_sequential: observe each linear after the earlier ones of its block are pruned.
    """

    example: ClassVar = {"sparsity": 0.5}

    method: Literal["wanda"] = "wanda"
    update: bool = False
    dampening_frac: float = Field(0.01, gt=0, le=1)
    true_sequential: bool = True

    @property
    def needs(self) -> Needs:
        return replace(
            super().needs,
            activations=True,
            second_moments=self.update,
            sequential=self.true_sequential,
            reason=self.method,
        )

    def compress(self, task: LinearTask) -> Outcome:
        W, moments = task.weight, task.moments
        assert moments is not None
        keep = keep_mask_of_stack(W.square() * moments.energy, task.parts, self.structure, "row") & (W != 0)
        if not self.update:
            return Outcome(W * keep)
        return Outcome(least_squares(W, keep, task.hessian, self.dampening_frac).to(task.dtype).float())
