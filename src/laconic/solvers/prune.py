"""Pruning in the error-feedback sweep (SparseGPT, arXiv 2301.00774), and the exact answer to a mask.

In the sweep's form, the weight w of column j costs w^2 D_j when it goes and all later columns answer for it: D_j is
1 / [H^-1]_jj of the columns not yet treated, and w what the sweep has made of the weight so far (`obs.lookahead`). A
mask is chosen for a unit of columns at a time; what is kept is left as it is, or rounded on a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laconic.formats.pieces import at_once
from laconic.kernels.columns import prune_columns
from laconic.solvers.grid import GridRounder
from laconic.solvers.masks import MaskStructure, StackedLinear, keep_mask_of_stack
from laconic.solvers.obs import LdlFactor, compensate_errors, round_in_units, run_column_loop


class PruningRounder:
    """Chooses which weights of a unit of columns to keep, then has them rounded.

    D: (in,), of the sweep's factor. zeros: (out, in) bool, in the sweep's order, weights that are zero already and stay
    so. columns: from how many an unstructured mask or one of tiles is chosen; N:M has a unit of its own. grid: what is
    kept is rounded on.
    """

    def __init__(
        self,
        parts: Sequence[StackedLinear],
        structure: MaskStructure,
        D: Tensor,
        zeros: Tensor,
        columns: int = 128,
        grid: GridRounder | None = None,
    ) -> None:
        self.parts, self.structure, self._D, self._zeros = parts, structure, D, zeros.T
        self.unit = structure.width if structure.group else structure.width * max(1, columns // structure.width)
        self._grid = grid

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        n = W.shape[0]
        zeros = self._zeros[first : first + n]
        worth = compensate_errors(W, X, A).square_().mul_(self._D[first : first + n, None]).masked_fill_(zeros, 0)
        keep = keep_mask_of_stack(worth.T.contiguous(), self.parts, self.structure, "matrix", first).T & ~zeros

        def rounded(at: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
            own = keep[at - first : at - first + W.shape[0]]
            return self._grid.round(at, W, X, A, own) if self._grid else prune_columns(W, X, A, own.to(W.dtype))

        return round_in_units(rounded, self._grid.unit if self._grid else _SHORT, first, W, X, A)


# Columns treated one by one, as in `grid.GridRounder`.
_SHORT = 32


def prune_with_hessian(
    W: Tensor,
    factor: LdlFactor,
    order: Tensor,
    zeros: Tensor,
    parts: Sequence[StackedLinear],
    structure: MaskStructure,
    *,
    columns: int = 128,
    grid: GridRounder | None = None,
) -> Tensor:
    """Prune W (out, in) by a sweep: the new weights, or with a grid their codes, (out, in).

    factor: of H in this order. zeros: (out, in) bool, weights that stay zero. grid: for columns in the same order.
    """
    parts = [
        replace(part, protected=part.protected[:, order])
        if part.protected is not None and part.protected.shape[1] > 1
        else part
        for part in parts
    ]
    pruner = PruningRounder(parts, structure, factor.D, zeros[:, order], columns, grid)
    return run_column_loop(W[:, order], factor.A, pruner, pruner.unit * max(1, 128 // pruner.unit))[:, order.argsort()]


def least_squares(W: Tensor, keep: Tensor, H: Tensor, dampening_frac: float = 0.01) -> Tensor:
    """The weights on a mask that come closest to W: of every row the minimiser of (w - v) H (w - v)^T, v zero where it
    is not kept. With r = (w - w_kept) H, v = w_kept + d, H_kk d_k = r_k on the kept inputs k.

    W: (out, in). keep: (out, in) bool. H: (in, in); dampening_frac of its mean diagonal is added to it.
    """
    H = H.clone()
    H.diagonal().add_(dampening_frac * H.diagonal().mean().clamp(min=1e-30))
    made = W * keep
    r = (W - made) @ H
    most = int(keep.sum(1).max())
    if most == 0:
        return made
    # Rows keep different inputs, but mostly as many: those of a row come first, and what fills it up is left alone.
    kept = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    for some in torch.arange(len(W), device=W.device).split(max(1, at_once(W) * _ROOM // most**2)):
        index, real = kept[some], keep[some].gather(1, kept[some])
        K = H[index[:, :, None], index[:, None, :]]
        K.mul_(real[:, :, None]).mul_(real[:, None, :])
        K.diagonal(dim1=1, dim2=2).add_((~real).to(K.dtype))
        d = torch.cholesky_solve((r[some].gather(1, index) * real)[:, :, None], torch.linalg.cholesky(K))[:, :, 0]
        made[some] = made[some].scatter_add(1, index, d)
    return made


# How many times as much as is worked on at once elsewhere is gathered for the rows of a batch.
_ROOM = 16
