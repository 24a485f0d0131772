"""The optimal-brain-surgeon sweep: round a weight column by column, later columns making up for earlier errors.

GPTQ (arXiv 2210.17323) minimises ||(W - Q) X||^2 = tr(E H E^T), E = W - Q, H = X X^T. Factor H = (I + U) D (I + U)^T
with U strictly upper triangular; then tr(E H E^T) = sum_j D_j ||E_j + sum_{k<j} E_k U_kj||^2, and rounding column j at
x_j = W_j + sum_{k<j} E_k U_kj makes each term as small as a grid allows. This is LDLQ (QuIP, arXiv 2307.13304, Theorem
6 shows that it is GPTQ, step for step). It needs one Cholesky factor and no inverse, its feedback is a matrix product
with the small errors rather than a running update of large weights, and it takes any *rounder*: an integer grid, FP8,
a pruning mask, a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LdlFactor:
    """A: (in, in) strictly lower triangular, A = U^T. D: (in,). dampening_frac: what it took to factor H."""

    A: Tensor
    D: Tensor
    dampening_frac: float


# Rows moved at a time: what holds the moments of a wide linear should hold no more copies than it must.
_PANEL = 512


def factor_hessian(
    H: Tensor, dampening_frac: float = 0.01, order: Tensor | None = None, *, attempts: int = 6
) -> LdlFactor:
    """Factor H + dampening_frac * mean(diag H) * I as (I + A^T) D (I + A), its inputs taken in this order.

    H: (in, in) float32, symmetric; an input that is always zero (a dead column) has a zero row and column, and
    after damping has no influence on the others. When the factorisation breaks down the damping is multiplied by
    ten, up to 1, and tried again. Raises: ValueError when H holds NaN or infinity, or cannot be factored at all.
    """
    mean = H.diagonal().mean()
    if not torch.isfinite(mean):
        raise ValueError("the activations hold NaN or infinity; check the model and the calibration text")
    if mean == 0:
        return LdlFactor(torch.zeros_like(H), torch.ones_like(H[0]), dampening_frac)
    for attempt in range(attempts):
        frac = min(dampening_frac * 10**attempt, 1.0) if attempt else dampening_frac
        # With both axes reversed, the lower Cholesky factor is R, the upper factor of H = R R^T.
        R_T = _reversed(H, order)
        R_T.diagonal().add_(frac * mean)
        # What LAPACK would put there column by column is the transpose as we look at it: the factor takes H's place.
        info = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(R_T.mT, out=(R_T.mT, info))
        if info == 0 and torch.isfinite(R_T.diagonal()).all():
            _turn_round(R_T)
            roots = R_T.diagonal().clone()
            A = R_T.div_(roots[:, None])
            A.diagonal().zero_()
            return LdlFactor(A, roots.square(), frac)
        dampening_frac = dampening_frac or 1e-3
    raise ValueError("the calibration Hessian cannot be factored; use more calibration text or a larger dampening_frac")


def _reversed(H: Tensor, order: Tensor | None) -> Tensor:
    """H with its rows and columns in the opposite of this order, in new memory."""
    if order is None:
        return H.flip(0, 1)
    last_first = order.flip(0)
    out = torch.empty_like(H)
    for rows, into in zip(last_first.split(_PANEL), out.split(_PANEL), strict=True):
        torch.index_select(H[rows], 1, last_first, out=into)
    return out


def _turn_round(M: Tensor) -> None:
    """Reverse both axes in place, a few numbers from either end at a time."""
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
        """Columns given at a time."""

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Round columns [first, first + n).

        W, X: (n, rows) target values, and the same with the feedback of all earlier columns added.
        A: (n, n) strictly lower triangular. Returns: codes (n, rows), any dtype, and E = W - q (n, rows).
        """


def run_column_loop(W: Tensor, A: Tensor, rounder: Rounder, block_size: int = 128) -> Tensor:
    """Round W (rows, in) with error feedback A (in, in); returns the rounder's codes, (rows, in).

    Columns go in units (the rounder's), units in blocks: feedback from earlier blocks is one large matrix product a
    block, from earlier units of the block a small one a unit, and only inside a unit is it column by column.
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
    """Round neighbouring columns unit by unit, with the feedback between units. Shapes as in Rounder."""
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
    """What the columns of a unit would be if none of them had to be rounded: the values a grid should fit.

    Where earlier errors can be answered for by the whole unit, its best real values are W + F (I + U)^-1, with
    F = X - W the feedback so far; these are the updated weights that GPTQ's own form keeps. Shapes as in Rounder.
    """
    identity = torch.eye(A.shape[0], device=A.device)
    answer: Tensor = torch.linalg.solve_triangular(identity + A, X - W, upper=False, unitriangular=True)
    return W + answer
