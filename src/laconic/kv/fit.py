"""Static parameters of a cache's formats from calibration: ranges for all tokens, and levels of a non-uniform grid.

Axes: B samples, H key-value heads, T tokens, C channels, L levels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.kv.format import KvFormat, decode_kv, encode_kv, normalize
from laconic.kv.kmeans import kmeans_levels

Correction = Literal["slope", "q_norm", "none"]

# Numbers to which levels are fitted; more make no measurable difference.
_SAMPLE = 1 << 18
# Repetitions of stretching levels and assigning numbers to the nearest level.
_STRETCHES = 3
# Shares of the full range that are tried.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)


def fit_static(fmt: KvFormat, x_BHTC: Tensor, weight: Tensor, *, correction: Correction = "none") -> dict[str, Tensor]:
    """Fit the static parameters of a format to numbers of the calibration set.

    Args:
        fmt: Format to fit.
        x_BHTC: Numbers of the calibration set.
        weight: Cost of a squared error of each number, broadcasting over x.
        correction: Correction of the levels: `slope` stretches them so that stored numbers have slope 1 on true ones,
            `q_norm` restores mean and standard deviation (KVQuant, arXiv 2401.18079, section 3.6), `none` leaves them.

    Returns:
        `scale` and `offset`, (H, C) or (1, 1), and `levels` (L,), float32; empty where nothing is static.
    """
    if not fmt.calibrated:
        return {}
    static: dict[str, Tensor] = {}
    if fmt.group_size is None:
        static = _search_ranges(fmt, x_BHTC, weight)
    if fmt.datatype == "table":
        u_BHTC, unit = normalize(fmt, x_BHTC, static)
        cost = (weight * unit.square()).expand_as(u_BHTC)
        flat, w = u_BHTC.flatten(), cost.flatten()
        step = max(1, len(flat) // _SAMPLE)
        flat, w = flat[::step], w[::step]
        levels_L = kmeans_levels(flat, 2**fmt.num_bits, w.clamp(min=1e-30))
        static["levels"] = _correct_levels(levels_L, flat, w, correction)
    return static


def _correct_levels(levels_L: Tensor, x: Tensor, weight: Tensor, correction: Correction) -> Tensor:
    """Correct the spread of k-means levels: they are means, so that rounded numbers vary less and products shrink.

    With D the share of the variance lost by rounding, the least-squares line of a stored number on the true one has
    slope 1 - D for k-means levels, and sqrt(1 - D) after Q-Norm.

    Args:
        levels_L: Levels of k-means.
        x: Numbers, (n,).
        weight: Their weights, (n,).
        correction: `q_norm` gives the rounded numbers the mean and standard deviation of the numbers (Q-Norm, KVQuant,
            arXiv 2401.18079, section 3.6); `slope` stretches the levels until the weighted line has slope 1.
    """
    if correction == "none":
        return levels_L
    x = x.contiguous()

    def nearest(levels_L: Tensor) -> Tensor:
        return levels_L[torch.bucketize(x, (levels_L[1:] + levels_L[:-1]) / 2)]

    if correction == "q_norm":
        rounded = nearest(levels_L)
        return (levels_L - rounded.mean()) * (x.std() / rounded.std().clamp(min=1e-12)) + x.mean()
    share = weight / weight.sum()
    mean = (share * x).sum()
    # Stretched levels may be nearest to other numbers than before.
    for _ in range(_STRETCHES):
        rounded = nearest(levels_L)
        rounded_mean = (share * rounded).sum()
        covariance = (share * (x - mean) * (rounded - rounded_mean)).sum().clamp(min=1e-12)
        levels_L = (levels_L - rounded_mean) * ((share * (x - mean).square()).sum() / covariance) + mean
    return levels_L


def _search_ranges(fmt: KvFormat, x_BHTC: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Find one range per channel, or one for all, of least weighted squared error among shrunk ones."""
    by_channel = fmt.axis == "channel"
    flat = x_BHTC.transpose(1, 2).flatten(0, 1) if by_channel else x_BHTC.reshape(-1, 1, 1)
    # Outliers are stored apart and must not widen the range.
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
    for share in _SHRINKS:
        candidate = _range(fmt, middle + (lo - middle) * share, middle + (hi - middle) * share)
        decoded = decode_kv(fmt, encode_kv(fmt, x_BHTC, candidate, torch.float32), x_BHTC.shape[-1], candidate)
        error = (decoded - x_BHTC).square() * weight
        cost = error.sum((0, 2)) if by_channel else error.sum().view(1, 1)
        better = cost < least
        least = torch.where(better, cost, least)
        best = {name: torch.where(better, candidate[name], best[name]) for name in best}
    return best


def _range(fmt: KvFormat, lo: Tensor, hi: Tensor) -> dict[str, Tensor]:
    """Return the parameters of ranges [lo, hi], (H, C) or (1, 1)."""
    if fmt.symmetric:
        return {"scale": (hi / fmt.max_code).clamp(min=1e-12)}
    if fmt.datatype == "int":
        return {"scale": ((hi - lo) / (2**fmt.num_bits - 1)).clamp(min=1e-12), "offset": lo}
    return {"scale": ((hi - lo) / 2 / fmt.max_code).clamp(min=1e-12), "offset": (hi + lo) / 2}
