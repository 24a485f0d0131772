"""Rounders to the grids of `formats`, for the column loop."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.formats import Params, ScalarFormat
from laconic.kernels.columns import affine_columns
from laconic.solvers.obs import LdlFactor, compensate_errors, factor_hessian, run_column_loop
from laconic.solvers.search import search_range

_HUGE_SCALE = 1e30


def round_with_hessian(
    fmt: ScalarFormat,
    W: Tensor,
    H: Tensor,
    params: Params,
    *,
    factor: LdlFactor | None = None,
    order: Tensor | None = None,
    block_size: int = 128,
    zeros: Tensor | None = None,
) -> Tensor:
    """Round W to fixed grids by the column loop, minimising tr(E H E^T) (GPTQ, LDLQ).

    Args:
        fmt: ScalarFormat of the grids.
        W: (out, in) float32.
        H: (in, in) float32, Hessian of the inputs, X X^T.
        params: Parameters of the grids, as the format stores them.
        factor: Factors of H in this order; None computes them.
        order: (in,) indices, the order of the columns; None takes them by falling activation energy.
        block_size: Columns per block of the loop.
        zeros: (out, in) bool, weights whose codes are zero in any case.

    Returns:
        Codes (out, in), in the original order of the columns.
    """
    order = order_by_energy(H) if order is None else order
    factor = factor_hessian(H, order=order) if factor is None else factor
    rounder = GridRounder(fmt, params, W.shape, order, zeros)
    return run_column_loop(W[:, order], factor.A, rounder, block_size)[:, order.argsort()]


def order_by_energy(H: Tensor, together: int = 1) -> Tensor:
    """Order columns by falling activation energy, the diagonal of the Hessian.

    Args:
        H: (in, in) Hessian.
        together: Number of neighbouring columns that stay together, in their order; it divides the number of columns.

    Returns:
        (in,) indices.
    """
    energy = H.diagonal().view(-1, together).sum(1)
    order = energy.argsort(descending=True, stable=True)
    return (order[:, None] * together + torch.arange(together, device=H.device)).flatten()


class GridRounder:
    """Rounder to fixed grids.

    Args:
        fmt: ScalarFormat of the grids.
        params: Parameters of the grids, as the format stores them.
        shape: Shape (out, in) of the weight.
        order: (in,) indices: the column of the weight that each step of the loop rounds.
        zeros: (out, in) bool, weights that become zero, in the order of the weight; None for none.
    """

    def __init__(
        self, fmt: ScalarFormat, params: Params, shape: tuple[int, ...], order: Tensor, zeros: Tensor | None = None
    ) -> None:
        self.fmt = fmt
        self._keep = None if zeros is None else ~zeros.T[order]
        # One row of parameters for each column or group, and the row that each step of the loop uses.
        self._params, self._row = params_by_column(fmt, params, shape, order)

    @property
    def unit(self) -> int:
        # A GPU rounds a whole block in one launch; on a CPU short units keep the column-by-column part small.
        return 128 if self._row.is_cuda else 32

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return self.round(first, W, X, A, None if self._keep is None else self._keep[first : first + W.shape[0]])

    def round(self, first: int, W: Tensor, X: Tensor, A: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Round a unit of columns; weights outside a mask become zero.

        Args:
            first: Index of the first column, in the order of the loop.
            W: (n, rows), as for `obs.Rounder`.
            X: (n, rows), as for `obs.Rounder`.
            A: (n, n), as for `obs.Rounder`.
            keep: (n, rows) bool, weights that are rounded; None for all.

        Returns:
            Codes and errors, both (n, rows).
        """
        rows = self._row[first : first + W.shape[0]]
        return round_columns(self.fmt, {n: p[rows] for n, p in self._params.items()}, W, X, A, keep)


class OnlineGridRounder:
    """Rounder that fits the grid of each group when the loop reaches it, to the weights compensated so far.

    Args:
        fmt: ScalarFormat with groups of columns.
        W: (out, in) float32, the weight to round; parameters of the whole tensor are fitted to it at once.
        dtype: Dtype in which parameters are stored.
        importance: (in,) weights of the columns in the search for the range of least squared error; None takes
            min-max ranges.
        zeros: (out, in) bool, weights that become zero; None for none.
    """

    def __init__(
        self, fmt: ScalarFormat, W: Tensor, dtype: torch.dtype, importance: Tensor | None, zeros: Tensor | None = None
    ) -> None:
        assert fmt.tiling.group_size is not None
        self.fmt, self.dtype, self.importance = fmt, dtype, importance
        self._keep = None if zeros is None else ~zeros.T
        self._shared = fmt.fit_shared(W)
        self._group_params: list[Params] = []

    @property
    def unit(self) -> int:
        assert self.fmt.tiling.group_size is not None
        return self.fmt.tiling.group_size

    @property
    def params(self) -> Params:
        """Parameters of all groups rounded so far, each (out, groups), and of the whole tensor."""
        names = [n for n in self._group_params[0] if n not in self._shared]
        return {n: torch.cat([p[n] for p in self._group_params], dim=1) for n in names} | dict(self._shared)

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        keep = None if self._keep is None else self._keep[first : first + W.shape[0]]
        compensated = compensate_errors(W, X, A)
        group = compensated.T if keep is None else (compensated * keep).T
        if self.importance is None:
            params = self.fmt.fit(group, self.dtype, self._shared)
        else:
            h = self.importance[first : first + W.shape[0]]
            params = search_range(self.fmt, group, h, dtype=self.dtype, shared=self._shared)
        self._group_params.append(params)
        elementwise = {n: p.expand(len(group), 1).T.expand(W.shape) for n, p in params.items()}
        return round_columns(self.fmt, elementwise, W, X, A, keep)


def round_columns(
    fmt: ScalarFormat, params: Params, W: Tensor, X: Tensor, A: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a unit column by column; weights outside a mask become zero, with an error of W.

    Args:
        fmt: ScalarFormat of the grids.
        params: Parameters, each (n, rows), one value per element.
        W: (n, rows), as for `obs.Rounder`.
        X: (n, rows), as for `obs.Rounder`.
        A: (n, n), as for `obs.Rounder`.
        keep: (n, rows) bool, weights that are rounded; None for all.

    Returns:
        Codes and errors, both (n, rows).
    """
    if fmt.integer_range is not None:
        zero_point = None if fmt.symmetric else params["zero_point"].float()
        scale = params["scale"].float()
        # A huge scale rounds every value to zero, so that kernels need no mask.
        scale = scale if keep is None else torch.where(keep, scale, _HUGE_SCALE)
        return affine_columns(W, X, A, scale, zero_point, fmt.integer_range)
    codes = torch.empty(W.shape, dtype=fmt.code_dtype, device=W.device)
    E = torch.empty_like(W)
    for j in range(W.shape[0]):
        x = torch.addmv(X[j], E[:j].T, A[j, :j]) if j else X[j]
        x = x if keep is None else x * keep[j]
        column = {n: p[j] for n, p in params.items()}
        codes[j] = fmt.encode_tiles(x[:, None], column)[:, 0]
        E[j] = W[j] - fmt.decode_tiles(codes[j][:, None], column)[:, 0]
    return codes, E


def params_by_column(fmt: ScalarFormat, params: Params, shape: tuple[int, ...], order: Tensor) -> tuple[Params, Tensor]:
    """Lay parameters out by column.

    Args:
        fmt: ScalarFormat of the grids.
        params: Parameters of the grids, as the format stores them.
        shape: Shape (out, in) of the weight.
        order: (in,) indices: the column of the weight at each step.

    Returns:
        Parameters, each (distinct columns, rows), and for each step the index (in,) of its column among them.
    """
    rows = shape[0]
    tiling = fmt.tiling
    # A parameter of the whole tensor holds for every tile.
    params = {n: p.expand(tiling.param_shape(shape)) for n, p in params.items()}
    match tiling.strategy:
        case "group":
            assert tiling.group_size is not None
            return {n: p.T.contiguous() for n, p in params.items()}, order // tiling.group_size
        case "block":
            assert tiling.block_structure is not None
            height, width = tiling.block_structure
            tall = {n: p.repeat_interleave(height, 0)[:rows].T.contiguous() for n, p in params.items()}
            return tall, order // width
        case _:
            wide = {n: p.reshape(-1, 1).expand(rows, 1).T.contiguous() for n, p in params.items()}
            return wide, torch.zeros_like(order)
