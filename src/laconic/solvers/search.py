"""Which range should a grid cover? The one whose rounding error is smallest, found by trying several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laconic.formats import Format, Params

# Elements worked on at a time: few enough to stay in cache, enough to be worth a call.
_CACHE = 1 << 18
_GPU = 1 << 26


def search_range(
    fmt: Format,
    w: Tensor,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    hessian: Tensor | None = None,
    steps: int = 24,
    shrink_to: float = 0.4,
) -> Params:
    """Parameters that minimise sum(importance * (w - round(w))^2) over ranges shrunk from min-max.

    Each tile tries ranges from the whole of [min, max] down to `shrink_to` of it. Symmetric grids shrink both ends
    alike; asymmetric ones then shrink each end on its own. Parameters are compared as they will be stored, in `dtype`.

    w: (out, in). importance: (in,) or None, the weight of a column's error, diag(H) for instance. hessian: in place of
    it, for grids of a group or a row, (in / n, n, n): the block of H of every n inputs that share a scale, so that a
    tile's error is e H e^T, what it adds to the output's if all else is exact.
    """
    if hessian is not None:
        return _search_groups(fmt, w, hessian, dtype, steps, shrink_to)
    tiles = fmt.tiling.split(w.float())
    shape, n = tiles.shape[:-1], tiles.shape[-1]
    tiles = tiles.reshape(-1, n)
    weights = _importance_tiles(fmt, w, importance)
    at_once = max(1, (_GPU if w.is_cuda else _CACHE) // n)
    found: dict[str, list[Tensor]] = {}
    for i in range(0, tiles.shape[0], at_once):
        chunk = tiles[i : i + at_once]
        # Importance repeats from row to row, so a chunk's share of it is taken by index.
        h = None if weights is None else weights[torch.arange(i, i + chunk.shape[0], device=w.device) % len(weights)]
        for name, value in _search(fmt, chunk, _weighted(h), dtype, steps, shrink_to).items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(parts).reshape(shape) for name, parts in found.items()}


def _search_groups(fmt: Format, w: Tensor, hessian: Tensor, dtype: torch.dtype, steps: int, shrink_to: float) -> Params:
    tiles = fmt.tiling.split(w.float())
    assert tiles.shape[1] == len(hessian), "a hessian goes with grids of a group or a row"
    at_once = max(1, (_GPU if w.is_cuda else _CACHE) // tiles.shape[-1])
    groups = []
    for g, H in enumerate(hessian):
        found = [_search(fmt, rows, _quadratic(H), dtype, steps, shrink_to) for rows in tiles[:, g].split(at_once)]
        groups.append({name: torch.cat([f[name] for f in found]) for name in found[0]})
    return {name: torch.stack([params[name] for params in groups], 1) for name in groups[0]}


Metric = Callable[[Tensor], Tensor]
"""The cost of each tile's errors: (..., n), which it may overwrite, to (...)."""


def _weighted(h: Tensor | None) -> Metric:
    return lambda e: (e.square_() if h is None else e.square_().mul_(h)).sum(-1)


def _quadratic(H: Tensor) -> Metric:
    return lambda e: (e @ H).mul_(e).sum(-1)


def _search(fmt: Format, tiles: Tensor, cost: Metric, dtype: torch.dtype, steps: int, shrink_to: float) -> Params:
    lo, hi = tiles.amin(-1), tiles.amax(-1)
    best = {name: p.clone() for name, p in fmt.from_range(lo, hi, dtype).items()}
    best_error = _error(fmt, tiles, best, cost)
    p_lo, p_hi = torch.ones_like(lo), torch.ones_like(hi)

    def attempt(a: Tensor, b: Tensor) -> None:
        params = fmt.from_range(lo * a, hi * b, dtype)
        error = _error(fmt, tiles, params, cost)
        better = error < best_error
        best_error.copy_(torch.where(better, error, best_error))
        p_lo.copy_(torch.where(better, a, p_lo))
        p_hi.copy_(torch.where(better, b, p_hi))
        for name, p in params.items():
            best[name].copy_(torch.where(better, p, best[name]))

    grid = torch.linspace(1.0, shrink_to, steps + 1).tolist()[1:]
    for p in grid:
        attempt(torch.full_like(lo, p), torch.full_like(hi, p))
    if not fmt.symmetric:
        around = [(1.0 - shrink_to) / steps * k * 2 for k in (-2, -1, 1, 2)]
        for delta in around:
            attempt((p_lo + delta).clamp_(max=1.0), p_hi.clone())
        for delta in around:
            attempt(p_lo.clone(), (p_hi + delta).clamp_(max=1.0))
    return best


def _error(fmt: Format, tiles: Tensor, params: Params, cost: Metric) -> Tensor:
    """What rounding each tile costs."""
    return cost(fmt.decode_tiles(fmt.encode_tiles(tiles, params), params).sub_(tiles))


def _importance_tiles(fmt: Format, w: Tensor, importance: Tensor | None) -> Tensor | None:
    """Importance laid out as the tiles of one row of tiles: (tiles before it repeats, n)."""
    if importance is None:
        return None
    match fmt.tiling.strategy:
        case "channel" | "token" | "group":
            return fmt.tiling.split(importance.float()[None, :]).flatten(0, -2)
        case _:
            tiles = fmt.tiling.split(importance.float().expand(w.shape))
            return tiles.flatten(0, -2)
