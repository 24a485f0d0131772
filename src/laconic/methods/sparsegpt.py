"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune with error feedback under the calibration Hessian.

Column by column some weights go, and later columns make up for it; which go is decided for 128 columns at a time, or
for each group of N:M as it comes, by what their loss would cost (algorithm 1). On the sweep of `solvers.obs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.solvers.grid import order_by_energy
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.solvers.obs import factor_hessian
from laconic.solvers.prune import least_squares, prune_with_hessian
from laconic.stages.pruning import PruningStage
from laconic.stages.stage import Outcome


class SparseGpt(PruningStage):
    """actorder: null goes left to right, as the paper does; `weight` in the order of falling activation energy, groups
    of N:M and columns of a tile side by side. dampening_frac: share of the Hessian's mean diagonal added to it.
    block_size: columns from which an unstructured mask is chosen at once. true_sequential: observe each linear after
    the earlier ones of its block are pruned. update: give the weights that are kept in the end the values of least
    squared output error, row by row."""

    method: Literal["sparsegpt"] = "sparsegpt"
    actorder: Literal["weight"] | None = None
    dampening_frac: float = Field(0.01, gt=0, le=1)
    block_size: int = Field(128, ge=1)
    true_sequential: bool = True
    update: bool = False

    @property
    def gram(self) -> bool:
        return True

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def prune(
        self, weight: Tensor, parts: Sequence[StackedLinear], moments: Moments | None, dtype: torch.dtype
    ) -> Outcome:
        assert moments is not None
        assert moments.H is not None
        H = moments.H
        # A dead input moves nothing: its weights are the first to go, since they are worth next to nothing.
        dead = int(((H.diagonal() == 0) & (weight != 0).any(0)).sum())
        order = order_by_energy(H, self.structure.width) if self.actorder else torch.arange(len(H), device=H.device)
        factor = factor_hessian(H, self.dampening_frac, order if self.actorder else None)
        made = prune_with_hessian(weight, factor, order, weight == 0, parts, self.structure, columns=self.block_size)
        if self.update:
            made = least_squares(weight, made != 0, H, factor.dampening_frac)
        return Outcome(made.to(dtype).float(), {"dampening_frac": factor.dampening_frac, "dead_columns": dead})
