"""Rounders onto the grids of `formats`, for the sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.formats import Format, Params, fit, fit_shared
from laconic.formats.int_affine import IntAffine
from laconic.kernels.columns import affine_columns
from laconic.solvers.obs import LdlFactor, compensate_errors, factor_hessian, run_column_loop
from laconic.solvers.search import search_range

_ENDLESS = 1e30


def round_with_hessian(
    fmt: Format,
    W: Tensor,
    H: Tensor,
    params: Params,
    *,
    factor: LdlFactor | None = None,
    order: Tensor | None = None,
    block_size: int = 128,
    zeros: Tensor | None = None,
) -> Tensor:
    """Codes (out, in) of W on grids fixed beforehand, by a sweep under H (in, in).

    order: of the columns, the loudest first when not given. factor: of H in that order, where it is at hand. zeros:
    (out, in) bool, weights that are to come out as zero.
    """
    order = order_by_energy(H) if order is None else order
    factor = factor_hessian(H, order=order) if factor is None else factor
    rounder = GridRounder(fmt, params, W.shape, order, zeros)
    return run_column_loop(W[:, order], factor.A, rounder, block_size)[:, order.argsort()]


def order_by_energy(H: Tensor, together: int = 1) -> Tensor:
    """Columns in the order of falling activation energy. together: neighbours that stay side by side, in their order;
    it divides the number of columns."""
    energy = H.diagonal().view(-1, together).sum(1)
    order = energy.argsort(descending=True, stable=True)
    return (order[:, None] * together + torch.arange(together, device=H.device)).flatten()


class GridRounder:
    """Rounds onto grids fixed beforehand. order: for each column of the sweep, which column of the weight it is. zeros:
    (out, in) bool, which weights become zero, in the order of the weight."""

    def __init__(
        self, fmt: Format, params: Params, shape: tuple[int, ...], order: Tensor, zeros: Tensor | None = None
    ) -> None:
        self.fmt = fmt
        self._kept = None if zeros is None else ~zeros.T[order]
        # One row of parameters for each column that has its own, and the row that each swept column uses.
        self._params, self._row = _by_column(fmt, params, shape, order)

    @property
    def unit(self) -> int:
        # A GPU takes a whole block in one launch; on a CPU short units keep the column by column work small.
        return 128 if self._row.is_cuda else 32

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return self.round(first, W, X, A, None if self._kept is None else self._kept[first : first + W.shape[0]])

    def round(self, first: int, W: Tensor, X: Tensor, A: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Round a unit. keep: (n, rows) bool, or None for all; the others become zero."""
        rows = self._row[first : first + W.shape[0]]
        return round_columns(self.fmt, {n: p[rows] for n, p in self._params.items()}, W, X, A, keep)


class OnlineGridRounder:
    """Rounds group by group, fitting each group's grid to what the sweep has made of its weights so far.

    W: (out, in), what will be swept; parameters of the whole tensor are fitted to it beforehand. importance: (in,)
    column weights for the search of least squared error, or None for min-max ranges. zeros: (out, in) bool, which
    weights become zero.
    """

    def __init__(
        self, fmt: Format, W: Tensor, dtype: torch.dtype, importance: Tensor | None, zeros: Tensor | None = None
    ) -> None:
        assert fmt.tiling.group_size is not None
        self.fmt, self.dtype, self.importance = fmt, dtype, importance
        self._kept = None if zeros is None else ~zeros.T
        self._shared = fit_shared(fmt, W)
        self._found: list[Params] = []

    @property
    def unit(self) -> int:
        assert self.fmt.tiling.group_size is not None
        return self.fmt.tiling.group_size

    @property
    def params(self) -> Params:
        """Parameters of all groups seen, each (out, groups), and of the whole tensor."""
        own = [n for n in self._found[0] if n not in self._shared]
        return {n: torch.cat([p[n] for p in self._found], dim=1) for n in own} | dict(self._shared)

    def __call__(self, first: int, W: Tensor, X: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        keep = None if self._kept is None else self._kept[first : first + W.shape[0]]
        ahead = compensate_errors(W, X, A)
        group = ahead.T if keep is None else (ahead * keep).T
        if self.importance is None:
            params = fit(self.fmt, group, self.dtype, self._shared)
        else:
            h = self.importance[first : first + W.shape[0]]
            params = search_range(self.fmt, group, h, dtype=self.dtype, shared=self._shared)
        self._found.append(params)
        own = {n: p.expand(len(group), 1).T.expand(W.shape) for n, p in params.items()}
        return round_columns(self.fmt, own, W, X, A, keep)


def round_columns(
    fmt: Format, params: Params, W: Tensor, X: Tensor, A: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a unit column by column; see `obs.Rounder`. params: each (n, rows), one value for every element. keep:
    (n, rows) bool, or None for all; the others become zero, and leave the error W."""
    if isinstance(fmt, IntAffine):
        zero_point = None if fmt.symmetric else params["zero_point"].float()
        scale = params["scale"].float()
        # On a step so wide everything is nearest to zero: no kernel needs to know of masks.
        scale = scale if keep is None else torch.where(keep, scale, _ENDLESS)
        return affine_columns(W, X, A, scale, zero_point, fmt.qmin, fmt.qmax)
    codes = torch.empty(W.shape, dtype=fmt.code_dtype, device=W.device)
    E = torch.empty_like(W)
    for j in range(W.shape[0]):
        x = torch.addmv(X[j], E[:j].T, A[j, :j]) if j else X[j]
        x = x if keep is None else x * keep[j]
        own = {n: p[j] for n, p in params.items()}
        codes[j] = fmt.encode_tiles(x[:, None], own)[:, 0]
        E[j] = W[j] - fmt.decode_tiles(codes[j][:, None], own)[:, 0]
    return codes, E


def _by_column(fmt: Format, params: Params, shape: tuple[int, ...], order: Tensor) -> tuple[Params, Tensor]:
    rows = shape[0]
    tiling = fmt.tiling
    # A parameter of the whole tensor is every tile's.
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
