"""Search for the range of a grid with the smallest rounding error, by trying several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laconic.formats import Params, ScalarFormat
from laconic.formats.chunks import chunk_elements

Cost = Callable[[Tensor], Tensor]
"""Cost (..., tiles) of rounding errors (..., tiles, n), which it may overwrite."""


def search_range(
    fmt: ScalarFormat,
    w: Tensor,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    hessian: Tensor | None = None,
    shared: Params | None = None,
    steps: int = 6,
    shrink_to: float = 0.4,
) -> Params:
    """Find parameters that minimise sum(importance * (w - round(w))^2) over ranges shrunk from min-max.

    Each tile tries ranges from [min, max], times the format's headroom, down to `shrink_to` of it in equal steps, then
    half and a quarter of a step to either side of the best. Symmetric grids shrink both ends equally; asymmetric ones
    then move each end by itself. Parameters are compared as they will be stored, in `dtype`.

    Args:
        fmt: ScalarFormat of the grid.
        w: (out, in).
        importance: (in,) weight of the squared error of each column, for instance diag(H); None weighs all equally.
        dtype: Dtype in which parameters are stored.
        hessian: Instead of `importance`, for grids of a group or a row: (in / n, n, n), the diagonal blocks of H of the
            inputs that share a scale. The error of a tile is then e H e^T, its part of the output error.
        shared: Parameters of the whole tensor, if `w` is a part of one; they follow from min-max and are not searched.
        steps: Number of equal steps from the headroom to `shrink_to`.
        shrink_to: Smallest range, as a share of min-max.

    Returns:
        Parameters as the format stores them.
    """
    shared = fmt.fit_shared(w) if shared is None else shared
    tiles = fmt.tiling.split(w.float())
    shape, n = tiles.shape[:-1], tiles.shape[-1]
    chunk = max(1, chunk_elements(w) // n)

    def search(tiles: Tensor, cost: Cost) -> Params:
        return _search(fmt, tiles, cost, dtype=dtype, shared=shared, steps=steps, shrink_to=shrink_to)

    if fmt.tiling.strategy not in ("channel", "token", "group"):
        assert hessian is None, "a Hessian is only for grids of a group or a row"
        flat = tiles.reshape(-1, n)
        weights = torch.ones_like(flat) if importance is None else _spread(fmt, w, importance)
        chunks = [search(t, _weighted(h)) for t, h in zip(flat.split(chunk), weights.split(chunk), strict=True)]
        return {name: torch.cat([c[name] for c in chunks]).reshape(shape) for name in chunks[0]} | dict(shared)
    # Tiles of the same columns have the same importance and are searched together, several columns at a time.
    across = tiles.transpose(0, 1)
    if hessian is None:
        weights = torch.ones_like(w[:1]) if importance is None else importance[None]
        costs = [_weighted_by_group(h) for h in fmt.tiling.split(weights.float())[0].split(max(1, chunk // shape[0]))]
    else:
        costs = [_quadratic(H) for H in hessian.split(max(1, chunk // shape[0]))]
    groups = across.split(max(1, chunk // shape[0]))
    columns = [
        [search(rows.contiguous(), cost) for rows in tiles.split(chunk, 1)]
        for tiles, cost in zip(groups, costs, strict=True)
    ]
    names = list(columns[0][0])
    joined = {name: torch.cat([torch.cat([c[name] for c in chunks], 1) for chunks in columns]) for name in names}
    return {name: p.T.contiguous() for name, p in joined.items()} | dict(shared)


def _search(
    fmt: ScalarFormat, tiles: Tensor, cost: Cost, *, dtype: torch.dtype, shared: Params, steps: int, shrink_to: float
) -> Params:
    """Search the ranges of tiles (..., n) together; arguments as of `search_range`."""
    lo, hi = tiles.amin(-1), tiles.amax(-1)

    def error(a: Tensor, b: Tensor) -> Tensor:
        params = fmt.from_range(lo * a, hi * b, dtype, shared)
        return cost(fmt.snap_tiles(tiles, {**params, **shared}).sub_(tiles))

    p_lo, p_hi = torch.ones_like(lo), torch.ones_like(hi)
    least = error(p_lo, p_hi)

    def attempt(a: Tensor, b: Tensor) -> None:
        cost_now = error(a, b)
        better = cost_now < least
        for old, new in ((least, cost_now), (p_lo, a), (p_hi, b)):
            old.copy_(torch.where(better, new, old))

    step = (fmt.headroom - shrink_to) / steps
    for p in torch.linspace(fmt.headroom, shrink_to, steps + 1).tolist():
        attempt(torch.full_like(lo, p), torch.full_like(hi, p))
    for part in (step / 2, step / 4):
        middle = p_lo.clone()
        for delta in (-part, part):
            attempt(middle + delta, middle + delta)
    if not fmt.symmetric:
        around = (-step, -step / 2, -step / 4, step / 4, step / 2, step)
        for delta in around:
            attempt((p_lo + delta).clamp_(max=1.0), p_hi.clone())
        for delta in around:
            attempt(p_lo.clone(), (p_hi + delta).clamp_(max=1.0))
    return fmt.from_range(lo * p_lo, hi * p_hi, dtype, shared)


def _weighted(h: Tensor) -> Cost:
    """Return sum(h e^2) per tile; h in the shape of the tiles."""
    return lambda e: e.square_().mul_(h).sum(-1)


def _weighted_by_group(h: Tensor) -> Cost:
    """Return sum(h e^2) per tile; h (groups, n), for tiles (groups, rows, n)."""
    return lambda e: (e.square_() @ h.unsqueeze(-1)).squeeze(-1)


def _quadratic(H: Tensor) -> Cost:
    """Return e H e^T per tile; H (groups, n, n), for tiles (groups, rows, n)."""
    return lambda e: (e @ H).mul_(e).sum(-1)


def _spread(fmt: ScalarFormat, w: Tensor, importance: Tensor) -> Tensor:
    """Lay importance (in,) out as the tiles of `w`, (tiles, n)."""
    return fmt.tiling.split(importance.float().expand(w.shape)).flatten(0, -2)
