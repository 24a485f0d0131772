"""Magnitude pruning: set the smallest weights to zero; the baseline of pruning methods.

Magnitudes are compared within a linear's whole matrix (Han et al., arXiv 1506.02626), or within each N:M group. Tiles
are compared by their sum of squares.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from laconic.solvers.masks import keep_mask_of_stack
from laconic.stages.linear import LinearTask, Outcome
from laconic.stages.pruning import PruningStage


class Magnitude(PruningStage):
    """Remove the smallest weights; only an allocation needs data."""

    example: ClassVar = {"sparsity": 0.5}

    method: Literal["magnitude"] = "magnitude"

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight * keep_mask_of_stack(task.weight.square(), task.parts, self.structure, "matrix"))
