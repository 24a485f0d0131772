"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune with error feedback under the calibration Hessian.

Weights are removed column by column, and later columns compensate for the error. Which ones is decided for 128 columns
at a time, or for each N:M group, by the error that their removal causes (algorithm 1). It uses the column loop of
`solvers.obs`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from laconic.solvers.grid import order_by_energy
from laconic.solvers.obs import factor_hessian
from laconic.solvers.prune import least_squares, prune_with_hessian
from laconic.stages.linear import LinearTask, Outcome
from laconic.stages.pruning import PruningStage
from laconic.stages.stage import Needs


class SparseGpt(PruningStage):
    """Prune with error feedback.

    Attributes:
        actorder: null treats columns from left to right, as the paper does; `weight` in the order of falling activation
            energy, groups of N:M and columns of a tile side by side.
        dampening_frac: share of the Hessian's mean diagonal added to it.
        block_size: number of columns from which an unstructured mask is chosen at once.
        true_sequential: observe each linear after the earlier ones of its block are pruned.
        update: at the end give the remaining weights the values of least squared output error, row by row.
    """

    example: ClassVar = {"sparsity": 0.5}

    method: Literal["sparsegpt"] = "sparsegpt"
    actorder: Literal["weight"] | None = None
    dampening_frac: float = Field(0.01, gt=0, le=1)
    block_size: int = Field(128, ge=1)
    true_sequential: bool = True
    update: bool = False

    @property
    def needs(self) -> Needs:
        return replace(super().needs, second_moments=True, sequential=self.true_sequential, reason=self.method)

    def compress(self, task: LinearTask) -> Outcome:
        W, H = task.weight, task.hessian
        # The weights of an input that is always zero have the lowest scores, and are removed first.
        dead = int(((H.diagonal() == 0) & (W != 0).any(0)).sum())
        order = order_by_energy(H, self.structure.width) if self.actorder else torch.arange(len(H), device=H.device)
        factor = factor_hessian(H, self.dampening_frac, order if self.actorder else None)
        pruned = prune_with_hessian(W, factor, order, W == 0, task.parts, self.structure, columns=self.block_size)
        if self.update:
            pruned = least_squares(W, pruned != 0, H, factor.dampening_frac)
        return Outcome(pruned.to(task.dtype).float(), {"dampening_frac": factor.dampening_frac, "dead_columns": dead})
