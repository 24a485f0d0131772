"""Magnitude pruning: set the smallest weights to zero; the baseline of pruning methods.

They are the smallest of a linear's whole matrix (Han et al., arXiv 1506.02626), or of every group of N:M; of tiles
those with the least sum of squares.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from laconic.solvers.masks import keep_mask_of_stack
from laconic.stages.linear import LinearTask, Outcome
from laconic.stages.pruning import PruningStage


class Magnitude(PruningStage):
    """Remove the smallest weights. Needs no data, unless an allocation does."""

    example: ClassVar = {"sparsity": 0.5}

    method: Literal["magnitude"] = "magnitude"

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight * keep_mask_of_stack(task.weight.square(), task.parts, self.structure, "matrix"))
