"""Which range should a grid cover? The one whose rounding error is smallest, found by trying several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laconic.formats import Format, Params, fit_shared
from laconic.formats.pieces import at_once

Cost = Callable[[Tensor], Tensor]
"""What the errors of tiles (..., tiles, n) cost, (..., tiles). It may overwrite them."""


def search_range(
    fmt: Format,
    w: Tensor,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    hessian: Tensor | None = None,
    shared: Params | None = None,
    steps: int = 6,
    shrink_to: float = 0.4,
) -> Params:
    """Parameters that minimise sum(importance * (w - round(w))^2) over ranges shrunk from min-max.

    Each tile tries ranges from [min, max], times the format's headroom, down to `shrink_to` of it in equal steps, then
    half and a quarter of a step to either side of the best. Symmetric grids shrink both ends alike; asymmetric ones
    then move each end on its own. Parameters are compared as they will be stored, in `dtype`.

    w: (out, in). importance: (in,) or None, the weight of a column's error, diag(H) for instance. hessian: in place of
    it, for grids of a group or a row, (in / n, n, n): the blocks of H of the inputs that share a scale, so that the
    error of a tile is e H e^T, what it adds to the output's error if all else is exact. shared: the parameters of the
    tensor that `w` is a part of, if it is; they are not searched, but follow from min-max.
    """
    shared = fit_shared(fmt, w) if shared is None else shared
    tiles = fmt.tiling.split(w.float())
    shape, n = tiles.shape[:-1], tiles.shape[-1]
    few = max(1, at_once(w) // n)

    def search(tiles: Tensor, cost: Cost) -> Params:
        return _search(fmt, tiles, cost, dtype, shared, steps, shrink_to)

    if fmt.tiling.strategy not in ("channel", "token", "group"):
        assert hessian is None, "a hessian goes with grids of a group or a row"
        flat = tiles.reshape(-1, n)
        weights = torch.ones_like(flat) if importance is None else _spread(fmt, w, importance)
        found = [search(some, _weighted(h)) for some, h in zip(flat.split(few), weights.split(few), strict=True)]
        return {name: torch.cat([f[name] for f in found]).reshape(shape) for name in found[0]} | dict(shared)
    # Tiles of the same columns have the same importance: they are searched together, several columns at a time.
    across = tiles.transpose(0, 1)
    if hessian is None:
        weights = torch.ones_like(w[:1]) if importance is None else importance[None]
        costs = [_weighted_alike(h) for h in fmt.tiling.split(weights.float())[0].split(max(1, few // shape[0]))]
    else:
        costs = [_quadratic(H) for H in hessian.split(max(1, few // shape[0]))]
    groups = across.split(max(1, few // shape[0]))
    columns = [
        [search(rows.contiguous(), cost) for rows in some.split(few, 1)]
        for some, cost in zip(groups, costs, strict=True)
    ]
    names = list(columns[0][0])
    joined = {name: torch.cat([torch.cat([f[name] for f in found], 1) for found in columns]) for name in names}
    return {name: p.T.contiguous() for name, p in joined.items()} | dict(shared)


def _search(
    fmt: Format, tiles: Tensor, cost: Cost, dtype: torch.dtype, shared: Params, steps: int, shrink_to: float
) -> Params:
    lo, hi = tiles.amin(-1), tiles.amax(-1)

    def error(a: Tensor, b: Tensor) -> Tensor:
        params = fmt.from_range(lo * a, hi * b, dtype, shared)
        return cost(fmt.snap_tiles(tiles, {**params, **shared}).sub_(tiles))

    p_lo, p_hi = torch.ones_like(lo), torch.ones_like(hi)
    least = error(p_lo, p_hi)

    def attempt(a: Tensor, b: Tensor) -> None:
        found = error(a, b)
        better = found < least
        for old, new in ((least, found), (p_lo, a), (p_hi, b)):
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
    """h: as the tiles."""
    return lambda e: e.square_().mul_(h).sum(-1)


def _weighted_alike(h: Tensor) -> Cost:
    """h: (groups, n), for tiles (groups, rows, n)."""
    return lambda e: (e.square_() @ h.unsqueeze(-1)).squeeze(-1)


def _quadratic(H: Tensor) -> Cost:
    """H: (groups, n, n), for tiles (groups, rows, n)."""
    return lambda e: (e @ H).mul_(e).sum(-1)


def _spread(fmt: Format, w: Tensor, importance: Tensor) -> Tensor:
    """Importance laid out as the tiles of `w`, (tiles, n)."""
    return fmt.tiling.split(importance.float().expand(w.shape)).flatten(0, -2)
