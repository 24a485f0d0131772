"""The column loop of the sweep: round one column, let every later column of the unit answer for its error.

Everything is transposed, (columns, rows), so that a column of the weight is contiguous in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_columns(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Round the n columns of a unit onto integer affine grids, one after another.

    Column j is rounded at x_j = X_j + sum_{k<j} A_jk E_k, and leaves the error E_j = W_j - q_j.

    W, X: (n, rows) float32, the target values and the values with the feedback of all earlier units added.
    A: (n, n) float32, strictly lower triangular. scale: (n, rows) float32. zero_point: the same, or None.
    Returns: codes (n, rows) int8 and E (n, rows) float32.
    """
    if X.is_cuda:
        from laconic.kernels.columns_triton import affine_columns_triton

        return affine_columns_triton(W, X, A, scale, zero_point, qmin, qmax)
    return affine_columns_torch(W, X, A, scale, zero_point, qmin, qmax)


def affine_columns_torch(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """`affine_columns` in plain torch: the reference, and what a CPU runs."""
    n = W.shape[0]
    codes, E = torch.empty_like(W), torch.empty_like(W)
    # Every call here costs more than its arithmetic, so results go straight to where they are kept.
    for j in range(n):
        x = torch.addmv(X[j], E[:j].T, A[j, :j]) if j else X[j]
        c = torch.div(x, scale[j], out=codes[j]).round_()
        if zero_point is None:
            c.clamp_(qmin, qmax)
            torch.addcmul(W[j], c, scale[j], value=-1, out=E[j])
        else:
            c.add_(zero_point[j]).clamp_(qmin, qmax)
            torch.addcmul(W[j], c - zero_point[j], scale[j], value=-1, out=E[j])
    return codes.to(torch.int8), E


def pruned_columns(W: Tensor, X: Tensor, A: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a column is not rounded, but loses some of its weights: those kept take up the errors so far.

    W, X, keep: (n, rows), keep of zeros and ones. A: (n, n). Returns: the new weights and E = W - weights, (n, rows).
    """
    n = W.shape[0]
    values, E = torch.empty_like(W), torch.empty_like(W)
    for j in range(n):
        x = torch.addmv(X[j], E[:j].T, A[j, :j]) if j else X[j]
        torch.mul(x, keep[j], out=values[j])
        torch.sub(W[j], values[j], out=E[j])
    return values, E
