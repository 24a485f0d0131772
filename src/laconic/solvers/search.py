"""Which range should a grid cover? The one whose rounding error is smallest, found by trying several."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.formats import Format, Params, fit_shared

# Elements worked on at a time: few enough to stay in cache, enough to be worth a call.
_CACHE = 1 << 18
_GPU = 1 << 26


def search_range(
    fmt: Format,
    w: Tensor,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shared: Params | None = None,
    steps: int = 24,
    shrink_to: float = 0.4,
) -> Params:
    """Parameters that minimise sum(importance * (w - round(w))^2) over ranges shrunk from min-max.

    Each tile tries ranges from [min, max], times the format's headroom, down to `shrink_to` of it. Symmetric grids
    shrink both ends alike; asymmetric ones then shrink each end on its own. Parameters are compared as they will be
    stored, in `dtype`.

    w: (out, in). importance: (in,) or None, the weight of a column's error, diag(H) for instance. shared: the
    parameters of the tensor that `w` is a part of, if it is; they are not searched, but follow from min-max.
    """
    shared = fit_shared(fmt, w) if shared is None else shared
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
        for name, value in _search(fmt, chunk, h, dtype, shared, steps, shrink_to).items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(parts).reshape(shape) for name, parts in found.items()} | dict(shared)


def _search(
    fmt: Format, tiles: Tensor, h: Tensor | None, dtype: torch.dtype, shared: Params, steps: int, shrink_to: float
) -> Params:
    lo, hi = tiles.amin(-1), tiles.amax(-1)
    best_error = _error(fmt, tiles, {**fmt.from_range(lo, hi, dtype, shared), **shared}, h)
    p_lo, p_hi = torch.ones_like(lo), torch.ones_like(hi)

    def attempt(a: Tensor, b: Tensor) -> None:
        error = _error(fmt, tiles, {**fmt.from_range(lo * a, hi * b, dtype, shared), **shared}, h)
        better = error < best_error
        best_error.copy_(torch.where(better, error, best_error))
        p_lo.copy_(torch.where(better, a, p_lo))
        p_hi.copy_(torch.where(better, b, p_hi))

    for p in torch.linspace(fmt.headroom, shrink_to, steps + 1).tolist():
        attempt(torch.full_like(lo, p), torch.full_like(hi, p))
    if not fmt.symmetric:
        around = [(1.0 - shrink_to) / steps * k * 2 for k in (-2, -1, 1, 2)]
        for delta in around:
            attempt((p_lo + delta).clamp_(max=1.0), p_hi.clone())
        for delta in around:
            attempt(p_lo.clone(), (p_hi + delta).clamp_(max=1.0))
    return fmt.from_range(lo * p_lo, hi * p_hi, dtype, shared)


def _error(fmt: Format, tiles: Tensor, params: Params, h: Tensor | None) -> Tensor:
    """The (importance-weighted) squared error of every tile."""
    error = fmt.decode_tiles(fmt.encode_tiles(tiles, params), params).sub_(tiles).square_()
    return (error if h is None else error.mul_(h)).sum(-1)


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
