"""What calibration fixes of a cache's formats: ranges that hold for all tokens, and levels of a non-uniform grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, decode_kv, encode_kv, normalised
from laconic.kv.kmeans import levels

Correction = Literal["slope", "q_norm", "none"]

# Numbers that levels are fitted to: more changes nothing that one could measure.
_SAMPLE = 1 << 18
# Times that levels are stretched and numbers given to the nearest anew.
_STRETCHES = 3


def fit_static(fmt: KvFormat, x: Tensor, weight: Tensor, *, correction: Correction = "none") -> dict[str, Tensor]:
    """Whatever `fmt` leaves to calibration, of what it is to store.

    x: (samples, heads, tokens, channels). weight: what a squared error costs, broadcasting over x. correction: of
    levels, see `_corrected`.
    Returns: scale and offset, (heads, channels) or (1, 1), and levels (2^bits,), float32; empty where nothing is left.
    """
    if not fmt.calibrated:
        return {}
    static: dict[str, Tensor] = {}
    if fmt.group_size is None:
        static = _ranges(fmt, x, weight)
    if fmt.datatype == "table":
        u, spread = normalised(fmt, x, static)
        cost = (weight * spread.square()).expand_as(u)
        flat, w = u.flatten(), cost.flatten()
        step = max(1, len(flat) // _SAMPLE)
        flat, w = flat[::step], w[::step]
        found = levels(flat, 2**fmt.num_bits, w.clamp(min=1e-30))
        static["levels"] = _corrected(found, flat, w, correction)
    return static


def _corrected(levels: Tensor, x: Tensor, weight: Tensor, correction: Correction) -> Tensor:
    """Levels that are means of what they stand for have less spread than it, and products with them shrink.

    q_norm: give them its mean and standard deviation (Q-Norm, KVQuant, arXiv 2401.18079, section 3.6). That undoes
    half: with D the share of the variance that rounding takes, the least-squares line of a stored number on the true
    one has slope 1 - D before, and sqrt(1 - D) after. slope: stretch them until it has slope 1, by weight.
    """
    if correction == "none":
        return levels
    x = x.contiguous()

    def nearest(levels: Tensor) -> Tensor:
        return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]

    if correction == "q_norm":
        found = nearest(levels)
        return (levels - found.mean()) * (x.std() / found.std().clamp(min=1e-12)) + x.mean()
    share = weight / weight.sum()
    middle = (share * x).sum()
    # Numbers may be nearest to other levels once these are farther apart.
    for _ in range(_STRETCHES):
        found = nearest(levels)
        stored = (share * found).sum()
        along = (share * (x - middle) * (found - stored)).sum().clamp(min=1e-12)
        levels = (levels - stored) * ((share * (x - middle).square()).sum() / along) + middle
    return levels


def _ranges(fmt: KvFormat, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """One range a channel, or one for all, of least weighted squared error among shrunk ones."""
    by_channel = fmt.axis == "channel"
    flat = x.transpose(1, 2).flatten(0, 1) if by_channel else x.reshape(-1, 1, 1)
    # What is stored apart does not stretch the range of the rest.
    tail = fmt.outlier_ratio / 2
    ordered = flat.sort(0).values
    n = len(ordered)
    lo, hi = ordered[min(n // 2, int(tail * n))], ordered[max(n // 2, n - 1 - int(tail * n))]
    if fmt.symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    if fmt.datatype != "int" or fmt.num_bits >= 8:
        return _range(fmt, lo, hi)
    best, least = _range(fmt, lo, hi), torch.full_like(lo, torch.inf)
    middle = (lo + hi) / 2
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5):
        tried = _range(fmt, middle + (lo - middle) * share, middle + (hi - middle) * share)
        error = (decode_kv(fmt, encode_kv(fmt, x, tried, torch.float32), x.shape[-1], tried) - x).square() * weight
        cost = error.sum((0, 2)) if by_channel else error.sum().view(1, 1)
        better = cost < least
        least = torch.where(better, cost, least)
        best = {name: torch.where(better, tried[name], best[name]) for name in best}
    return best


def _range(fmt: KvFormat, lo: Tensor, hi: Tensor) -> dict[str, Tensor]:
    """lo, hi: (heads, channels) or (1, 1)."""
    reach = fmt.reach
    if fmt.symmetric:
        return {"scale": (hi / reach).clamp(min=1e-12)}
    if fmt.datatype == "int":
        return {"scale": ((hi - lo) / (2**fmt.num_bits - 1)).clamp(min=1e-12), "offset": lo}
    return {"scale": ((hi - lo) / 2 / reach).clamp(min=1e-12), "offset": (hi + lo) / 2}
