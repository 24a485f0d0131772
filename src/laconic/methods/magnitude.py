"""Magnitude pruning: set the smallest weights to zero; the baseline of pruning methods.

They are the smallest of a linear's whole matrix (Han et al., arXiv 1506.02626), or of every group of N:M; of tiles
those with the least sum of squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from laconic.solvers.masks import StackedLinear, keep_mask_of_stack
from laconic.solvers.moments import Moments
from laconic.stages.pruning import PruningStage
from laconic.stages.stage import Outcome


class Magnitude(PruningStage):
    """Looks at no data, unless an allocation does."""

    method: Literal["magnitude"] = "magnitude"

    def prune(
        self, weight: Tensor, parts: Sequence[StackedLinear], moments: Moments | None, dtype: torch.dtype
    ) -> Outcome:
        return Outcome(weight * keep_mask_of_stack(weight.square(), parts, self.structure, "matrix"))
