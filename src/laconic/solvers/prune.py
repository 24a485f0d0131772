"""Pruning in the column loop (SparseGPT, arXiv 2301.00774), and the exact least-squares weights for a fixed mask.

Pruning weight w of column j, with all later columns compensating, costs w^2 D_j: D_j is 1 / [H^-1]_jj over the columns
not yet processed, and w the weight as compensated so far (`obs.compensate_errors`). A mask is chosen for a unit of
columns at a time; the remaining weights stay dense or are rounded to a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laconic.formats.chunks import chunk_elements
from laconic.kernels.columns import prune_columns
from laconic.solvers.grid import GridRounder
from laconic.solvers.masks import MaskStructure, StackedLinear, keep_mask_of_stack
from laconic.solvers.obs import LdlFactor, compensate_errors, round_in_units, run_column_loop


class PruningRounder:
    """Rounder that chooses a mask for a unit of columns, then rounds the remaining weights or keeps them dense.

    Args:
        linears: The stacked linears, each with its sparsity.
        structure: Structure of the mask.
        D: (in,), of the factored Hessian.
        zeros: (out, in) bool, in the order of the loop: weights that are zero already and stay zero.
        columns: Columns per mask, if it is unstructured or of tiles; for N:M a mask has M columns.
        grid: Rounder of the remaining weights; None keeps them dense.
    """

    def __init__(
        self,
        linears: Sequence[StackedLinear],
        structure: MaskStructure,
        D: Tensor,
        zeros: Tensor,
        columns: int = 128,
        grid: GridRounder | None = None,
    ) -> None:
        self.linears, self.structure, self._D, self._zeros = linears, structure, D, zeros.T
        self.unit = structure.width if structure.group else structure.width * max(1, columns // structure.width)
        self._grid = grid

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        n = W.shape[0]
        zeros = self._zeros[first : first + n]
        scores = compensate_errors(W, X, A).square_().mul_(self._D[first : first + n, None]).masked_fill_(zeros, 0)
        keep = keep_mask_of_stack(scores.T.contiguous(), self.linears, self.structure, "matrix", first).T & ~zeros

        def round_unit(start: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
            mask = keep[start - first : start - first + W.shape[0]]
            return self._grid.round(start, W, X, A, mask) if self._grid else prune_columns(W, X, A, mask.to(W.dtype))

        return round_in_units(round_unit, self._grid.unit if self._grid else _DENSE_UNIT, first, W, X, A)


# Columns per unit without a grid, as `grid.GridRounder` has on a CPU.
_DENSE_UNIT = 32


def prune_with_hessian(
    W: Tensor,
    factor: LdlFactor,
    order: Tensor,
    zeros: Tensor,
    linears: Sequence[StackedLinear],
    structure: MaskStructure,
    *,
    columns: int = 128,
    grid: GridRounder | None = None,
) -> Tensor:
    """Prune W by the column loop: choose a mask, and let the remaining weights compensate the pruned ones (SparseGPT).

    Args:
        W: (out, in) float32.
        factor: Factors of the Hessian, in this order of the columns.
        order: (in,) indices, the order of the columns.
        zeros: (out, in) bool, weights that are zero already and stay zero.
        linears: The linears whose rows are stacked in W, each with its sparsity.
        structure: Structure of the mask.
        columns: Columns per mask, if it is unstructured or of tiles.
        grid: Rounder of the remaining weights, for columns in the same order; None keeps them dense.

    Returns:
        The new weights, or with a grid their codes, (out, in).
    """
    linears = [_reorder_protected(linear, order) for linear in linears]
    rounder = PruningRounder(linears, structure, factor.D, zeros[:, order], columns, grid)
    block_size = rounder.unit * max(1, 128 // rounder.unit)
    return run_column_loop(W[:, order], factor.A, rounder, block_size)[:, order.argsort()]


def _reorder_protected(linear: StackedLinear, order: Tensor) -> StackedLinear:
    """Put protected columns in the order of the loop; protected rows are unchanged."""
    if linear.protected is None or linear.protected.shape[1] == 1:
        return linear
    return replace(linear, protected=linear.protected[:, order])


def least_squares(W: Tensor, keep: Tensor, H: Tensor, dampening_frac: float = 0.01) -> Tensor:
    """Compute the weights v on a fixed mask that minimise (w - v) H (w - v)^T in every row w of W.

    With w_k the row on the mask, r = (w - w_k) H and v = w_k + d, d solves H_kk d_k = r_k on the remaining inputs k.

    Args:
        W: (out, in) float32.
        keep: (out, in) bool, weights that remain.
        H: (in, in) float32, the Hessian.
        dampening_frac: Share of the mean diagonal of H that is added to its diagonal.

    Returns:
        (out, in) float32, zero outside the mask.
    """
    H = H.clone()
    H.diagonal().add_(dampening_frac * H.diagonal().mean().clamp(min=1e-30))
    solution = W * keep
    r = (W - solution) @ H
    width = int(keep.sum(1).max())
    if width == 0:
        return solution
    # Rows keep different inputs, but similar numbers of them: the indices of a row are padded to the longest, and the
    # padding becomes rows of the identity.
    indices = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    for rows in torch.arange(len(W), device=W.device).split(max(1, chunk_elements(W) * _BATCH_FACTOR // width**2)):
        index, valid = indices[rows], keep[rows].gather(1, indices[rows])
        K = H[index[:, :, None], index[:, None, :]]
        K.mul_(valid[:, :, None]).mul_(valid[:, None, :])
        K.diagonal(dim1=1, dim2=2).add_((~valid).to(K.dtype))
        d = torch.cholesky_solve((r[rows].gather(1, index) * valid)[:, :, None], torch.linalg.cholesky(K))[:, :, 0]
        solution[rows] = solution[rows].scatter_add(1, index, d)
    return solution


# Elements gathered for a batch of rows, in multiples of `formats.chunks.chunk_elements`.
_BATCH_FACTOR = 16
