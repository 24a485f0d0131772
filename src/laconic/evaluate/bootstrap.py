"""Intervals by resampling: windows of a text, or documents of a task, drawn again with replacement.

The percentile bootstrap (Efron, 1979). A resample is how often each unit was drawn, so that a statistic of many
resamples is a matrix product, and two models that are given the same counts are compared on the same units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]
"""From counts (resamples, units) to a value for each resample (resamples,)."""

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
# Counts that are held at once; more resamples come in several pieces.
_AT_ONCE = 4_000_000


def method_of(over: str, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """What a result says of its intervals. over: what is drawn, `windows` or `documents`."""
    return {"level": LEVEL, "resamples": resamples, "seed": seed, "over": over, "method": "percentile bootstrap"}


@dataclass(frozen=True)
class Ratio:
    """link(sum of a / sum of b) over units, as most measures are: a mean has b = 1; a perplexity, log-likelihoods,
    tokens, and a link. a, b: (units,)."""

    a: Values
    b: Values
    link: Callable[[Values], Values] = lambda x: x

    def __call__(self, counts: Values) -> Values:
        """counts: (resamples, units). Returns: (resamples,)."""
        return self.link((counts @ self.a) / (counts @ self.b))


def mean_of(values: Values) -> Ratio:
    """The mean of a number a unit."""
    return Ratio(values, np.ones(len(values)))


def perplexity_of(nll: Values) -> Ratio:
    """exp of the mean of a unit's mean negative log-likelihood, infinite where that overflows; units of one size."""
    return Ratio(nll, np.ones(len(nll)), exp)


def exp(x: Values) -> Values:
    """exp, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(x))


def draw(statistic: Statistic, strata: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED) -> Values:
    """Values of a statistic over resamples: (resamples,).

    strata: how many units there are of each kind (one number, or for a group of tasks one a task); each kind is drawn
    from by itself, so that every resample has as many of it. With the same strata and seed the draws are the same,
    whatever the statistic.
    """
    return np.concatenate([statistic(counts) for counts in _counts(strata, resamples, seed)])


def interval(
    statistic: Statistic, strata: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[float] | None:
    """[low, high] between which a statistic lies in 95 % of resamples; None where a kind has less than two units."""
    return None if min(strata) < 2 else between(draw(statistic, strata, resamples=resamples, seed=seed))


def paired(
    ours: Statistic, theirs: Statistic, strata: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[float] | None:
    """[low, high] of the difference of two models' statistics, both taken of the same units in every resample."""
    return interval(lambda counts: _less(ours(counts), theirs(counts)), strata, resamples=resamples, seed=seed)


def between(draws: Values, level: float = LEVEL) -> list[float] | None:
    """The middle part of draws; None when there is none since some are no finite numbers."""
    if not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _less(a: Values, b: Values) -> Values:
    # inf - inf is no number, which `between` then says.
    with np.errstate(invalid="ignore"):
        return np.asarray(a - b)


def _counts(strata: Sequence[int], resamples: int, seed: int) -> Iterator[Values]:
    """Counts (resamples of a piece, units of all strata), each stratum's adding up to its size."""
    rng = np.random.default_rng(seed)
    piece = max(1, min(resamples, _AT_ONCE // sum(strata)))
    for at in range(math.ceil(resamples / piece)):
        rows = min(piece, resamples - at * piece)
        drawn = [rng.multinomial(n, np.full(n, 1 / n), size=rows) for n in strata]
        yield np.concatenate(drawn, axis=1).astype(np.float64)
