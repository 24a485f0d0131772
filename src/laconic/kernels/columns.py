"""The inner column loop of GPTQ and SparseGPT: round or prune a column, then compensate its error in later columns.

All tensors are transposed, (columns, rows), so that a column of the weight is contiguous in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_columns(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Round the n columns of a unit to integer affine grids, one after another.

    Column j is rounded at x_j = X_j + sum_{k<j} A_jk E_k, and leaves the error E_j = W_j - q_j.

    Args:
        W: (n, rows) float32, the values to approximate.
        X: (n, rows) float32, W with the compensation of the errors of all earlier units added.
        A: (n, n) float32, strictly lower triangular.
        scale: (n, rows) float32.
        zero_point: (n, rows) float32, or None for symmetric grids.
        code_range: Smallest and largest code.

    Returns:
        Codes (n, rows) int8 and errors E (n, rows) float32.
    """
    if X.is_cuda:
        from laconic.kernels.columns_triton import affine_columns_triton

        return affine_columns_triton(W, X, A, scale, zero_point, code_range)
    return affine_columns_torch(W, X, A, scale, zero_point, code_range)


def affine_columns_torch(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute `affine_columns` in plain torch: the reference implementation, used on a CPU.

    Args:
        W: (n, rows) float32, the values to approximate.
        X: (n, rows) float32, W with the compensation of the errors of all earlier units added.
        A: (n, n) float32, strictly lower triangular.
        scale: (n, rows) float32.
        zero_point: (n, rows) float32, or None for symmetric grids.
        code_range: Smallest and largest code.

    Returns:
        Codes (n, rows) int8 and errors E (n, rows) float32.
    """
    n, (qmin, qmax) = W.shape[0], code_range
    codes, E = torch.empty_like(W), torch.empty_like(W)
    # The overhead of a call exceeds its arithmetic here, so results are written directly into the output tensors.
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


def prune_columns(W: Tensor, X: Tensor, A: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Prune the n columns of a unit, one after another: remaining weights compensate the errors of earlier columns.

    Args:
        W: (n, rows) float32, the values to approximate.
        X: (n, rows) float32, W with the compensation of the errors of all earlier units added.
        A: (n, n) float32, strictly lower triangular.
        keep: (n, rows), 1 for weights that remain and 0 for pruned ones.

    Returns:
        The new weights and the errors E = W - weights, both (n, rows) float32.
    """
    n = W.shape[0]
    values, E = torch.empty_like(W), torch.empty_like(W)
    for j in range(n):
        x = torch.addmv(X[j], E[:j].T, A[j, :j]) if j else X[j]
        torch.mul(x, keep[j], out=values[j])
        torch.sub(W[j], values[j], out=E[j])
    return values, E
