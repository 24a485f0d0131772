"""The column loop of GPTQ, SparseGPT and LDLQ: process a weight column by column, later columns compensate errors.

GPTQ (arXiv 2210.17323) minimises ||(W - Q) X||^2 = tr(E H E^T), E = W - Q, H = X X^T. Factor H = (I + U) D (I + U)^T
with U strictly upper triangular; then tr(E H E^T) = sum_j D_j ||E_j + sum_{k<j} E_k U_kj||^2, and rounding column j at
x_j = W_j + sum_{k<j} E_k U_kj makes each term as small as a grid allows. This is LDLQ (QuIP, arXiv 2307.13304; its
Theorem 6 shows that LDLQ and GPTQ are the same algorithm). It needs one Cholesky factor and no inverse, and its error
feedback is a matrix product with the small errors, not a running update of the large weights. A `Rounder` chooses the
values: an integer grid, FP8, a pruning mask, a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from laconic.solvers.moments import non_finite_error


@dataclass(frozen=True)
class LdlFactor:
    """Factors of a damped Hessian H + dampening_frac * mean(diag H) * I = (I + A^T) D (I + A).

    Attributes:
        A: (in, in) float32, strictly lower triangular; A = U^T of the module's docstring.
        D: (in,) float32, the diagonal of D.
        dampening_frac: The damping with which the factorization succeeded.
    """

    A: Tensor
    D: Tensor
    dampening_frac: float


# Rows copied or reversed at a time: bounds the memory beside the moments of a wide linear.
_PANEL = 512


def factor_hessian(
    H: Tensor, dampening_frac: float = 0.01, order: Tensor | None = None, *, attempts: int = 6
) -> LdlFactor:
    """Factor H + dampening_frac * mean(diag H) * I as (I + A^T) D (I + A), with the columns of H in a given order.

    An input that is always zero (a dead column) has a zero row and column in H; after damping it has no influence on
    the others. When the factorization fails, the damping is multiplied by ten, up to 1, and tried again.

    Args:
        H: (in, in) float32, symmetric.
        dampening_frac: Share of the mean diagonal that is added to the diagonal.
        order: (in,) indices, the order of the columns; None keeps theirs.
        attempts: Number of dampings to try.

    Returns:
        The factors, their columns in this order.

    Raises:
        ValueError: H holds NaN or infinity, or cannot be factored with any damping.
    """
    mean = H.diagonal().mean()
    if not torch.isfinite(mean):
        raise non_finite_error()
    if mean == 0:
        return LdlFactor(torch.zeros_like(H), torch.ones_like(H[0]), dampening_frac)
    for attempt in range(attempts):
        frac = min(dampening_frac * 10**attempt, 1.0) if attempt else dampening_frac
        # With both axes reversed, the lower Cholesky factor is R, the upper factor of H = R R^T.
        R_T = _reversed(H, order)
        R_T.diagonal().add_(frac * mean)
        # LAPACK writes column-major: the transposed views let the factor overwrite H without a copy.
        info = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(R_T.mT, out=(R_T.mT, info))
        if info == 0 and torch.isfinite(R_T.diagonal()).all():
            _reverse_in_place(R_T)
            roots = R_T.diagonal().clone()
            A = R_T.div_(roots[:, None])
            A.diagonal().zero_()
            return LdlFactor(A, roots.square(), frac)
        dampening_frac = dampening_frac or 1e-3
    raise ValueError("the calibration Hessian cannot be factored; use more calibration text or a larger dampening_frac")


def _reversed(H: Tensor, order: Tensor | None) -> Tensor:
    """Copy H with its rows and columns in the reverse of an order."""
    if order is None:
        return H.flip(0, 1)
    last_first = order.flip(0)
    out = torch.empty_like(H)
    for rows, panel in zip(last_first.split(_PANEL), out.split(_PANEL), strict=True):
        torch.index_select(H[rows], 1, last_first, out=panel)
    return out


def _reverse_in_place(M: Tensor) -> None:
    """Reverse both axes of a matrix in place, swapping panels from both ends."""
    flat = M.view(-1)
    n, step = len(flat), _PANEL * M.shape[1]
    for i in range(0, n // 2, step):
        j = min(i + step, n // 2)
        head = flat[i:j].flip(0)
        flat[i:j] = flat[n - j : n - i].flip(0)
        flat[n - j : n - i] = head


class Rounder(Protocol):
    """Chooses the values of a unit of neighbouring columns."""

    @property
    def unit(self) -> int:
        """Number of columns per call."""

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Round columns [first, first + n).

        Args:
            first: Index of the first column, in the order of the loop.
            W: (n, rows) float32, the values to approximate.
            X: (n, rows) float32, W with the compensation of the errors of all earlier columns added.
            A: (n, n) float32, strictly lower triangular.

        Returns:
            Codes (n, rows) of any dtype, and errors E = W - q, (n, rows) float32.
        """


def run_column_loop(W: Tensor, A: Tensor, rounder: Rounder, block_size: int = 128) -> Tensor:
    """Round all columns of a weight in order, compensating each column's error in later columns.

    Columns are processed in units (of the rounder), units in blocks: compensation between blocks is one large matrix
    product per block, between units of a block a small one per unit, and only inside a unit is it column by column.

    Args:
        W: (rows, in) float32.
        A: (in, in) float32, strictly lower triangular, of `factor_hessian`.
        rounder: Chooses the values of a unit.
        block_size: Columns of a block; rounded down to a multiple of the unit, at least one unit.

    Returns:
        The rounder's codes, (rows, in).
    """
    W = W.T.contiguous()
    n = W.shape[0]
    E = torch.empty_like(W)
    codes: Tensor | None = None
    step = rounder.unit * max(1, block_size // rounder.unit)
    for start in range(0, n, step):
        stop = min(start + step, n)
        X = torch.addmm(W[start:stop], A[start:stop, :start], E[:start]) if start else W[:stop]
        rounded, E[start:stop] = round_in_units(
            rounder, rounder.unit, start, W[start:stop], X, A[start:stop, start:stop]
        )
        if codes is None:
            codes = torch.empty(W.shape, dtype=rounded.dtype, device=W.device)
        codes[start:stop] = rounded
    assert codes is not None
    return codes.T.contiguous()


def round_in_units(
    rounder: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    unit: int,
    first: int,
    W: Tensor,
    X: Tensor,
    A: Tensor,
) -> tuple[Tensor, Tensor]:
    """Round neighbouring columns unit by unit, compensating errors between units.

    Args:
        rounder: Rounds a unit; arguments and results as of `Rounder`.
        unit: Columns per call.
        first: Index of the first column, in the order of the loop.
        W: (n, rows), as for `Rounder`.
        X: (n, rows), as for `Rounder`.
        A: (n, n), as for `Rounder`.

    Returns:
        Codes and errors E, both (n, rows).
    """
    n = W.shape[0]
    E = torch.empty_like(W)
    codes: Tensor | None = None
    for i in range(0, n, unit):
        j = min(i + unit, n)
        x = torch.addmm(X[i:j], A[i:j, :i], E[:i]) if i else X[:j]
        rounded, E[i:j] = rounder(first + i, W[i:j], x, A[i:j, i:j])
        if codes is None:
            codes = torch.empty(W.shape, dtype=rounded.dtype, device=W.device)
        codes[i:j] = rounded
    assert codes is not None
    return codes, E


def compensate_errors(W: Tensor, X: Tensor, A: Tensor) -> Tensor:
    """Compute the columns of a unit that compensate all earlier errors best if none of them is rounded.

    A grid or a mask of the unit is fitted to these values. They are W + F (I + U)^-1, with F = X - W the feedback so
    far: the updated weights that GPTQ's own formulation keeps.

    Args:
        W: (n, rows), as for `Rounder`.
        X: (n, rows), as for `Rounder`.
        A: (n, n), as for `Rounder`.

    Returns:
        (n, rows) float32.
    """
    identity = torch.eye(A.shape[0], device=A.device)
    compensation: Tensor = torch.linalg.solve_triangular(identity + A, X - W, upper=False, unitriangular=True)
    return W + compensation
