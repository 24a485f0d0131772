"""Confidence intervals by the percentile bootstrap (Efron, 1979), over windows of a text or documents of a task.

A resample is stored as counts: how often each unit was drawn. A statistic of many resamples is then a matrix product,
and two models that get the same counts are compared on the same units.
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
"""Maps counts (resamples, units) to a value per resample (resamples,)."""

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
# Largest number of counts in memory; more resamples are computed in several batches.
_MAX_COUNTS = 4_000_000


def describe_intervals(over: str, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """Describe the method of the intervals, for a result.

    Args:
        over: The units that are resampled, `windows` or `documents`.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        The value of the key `intervals` of a result.
    """
    return {"level": LEVEL, "resamples": resamples, "seed": seed, "over": over, "method": "percentile bootstrap"}


@dataclass(frozen=True)
class Ratio:
    """The statistic link(sum of a / sum of b) over units.

    A mean has b = 1. A perplexity has negative log-likelihoods, numbers of tokens, and exp.

    Attributes:
        a: (units,) numerators.
        b: (units,) denominators.
        link: Function of the ratio, (resamples,) to (resamples,).
    """

    a: Values
    b: Values
    link: Callable[[Values], Values] = lambda x: x

    def __call__(self, counts: Values) -> Values:
        return self.link((counts @ self.a) / (counts @ self.b))


def mean_of(values: Values) -> Ratio:
    """Return the mean of values as a statistic of resampled units.

    Args:
        values: (units,) value of each unit.
    """
    return Ratio(values, np.ones(len(values)))


def perplexity_of(nll: Values) -> Ratio:
    """Return the perplexity as a statistic of resampled units, which have equal numbers of tokens.

    Args:
        nll: (units,) mean negative log-likelihood of each unit, in nats per token.
    """
    return Ratio(nll, np.ones(len(nll)), exp)


def exp(x: Values) -> Values:
    """Compute the exponential function, infinite where it overflows.

    Args:
        x: Exponents, of any shape.

    Returns:
        float64 of the same shape.
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(x))


def draw(statistic: Statistic, strata: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED) -> Values:
    """Compute a statistic of resamples.

    The resamples depend on strata and seed only, not on the statistic.

    Args:
        statistic: The statistic.
        strata: Number of units of each stratum (one stratum, or for a group of tasks one per task). Each stratum is
            resampled separately, so that every resample has as many units of it.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        (resamples,) values.
    """
    return np.concatenate([statistic(counts) for counts in _counts(strata, resamples, seed)])


def interval(
    statistic: Statistic, strata: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[float] | None:
    """Compute the 95 % interval of a statistic.

    Args:
        statistic: The statistic.
        strata: Number of units of each stratum; see `draw`.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        [low, high]; None if a stratum has fewer than two units, or the value of a resample is not finite.
    """
    return None if min(strata) < 2 else central_interval(draw(statistic, strata, resamples=resamples, seed=seed))


def paired_interval(
    statistic: Statistic,
    baseline: Statistic,
    strata: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[float] | None:
    """Compute the 95 % interval of the difference of two models' statistics on the same resamples.

    Args:
        statistic: Statistic of the model.
        baseline: Statistic of its original.
        strata: Number of units of each stratum, the same for both; see `draw`.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        [low, high] of model - original; None if a stratum has fewer than two units, or a difference is not finite.
    """
    return interval(
        lambda counts: _subtract(statistic(counts), baseline(counts)), strata, resamples=resamples, seed=seed
    )


def central_interval(draws: Values, level: float = LEVEL) -> list[float] | None:
    """Compute the central interval of draws by the percentile method.

    Args:
        draws: (resamples,) values of a statistic.
        level: Share of the draws inside the interval, in (0, 1).

    Returns:
        [low, high], the quantiles (1 - level) / 2 and (1 + level) / 2; None if some draws are not finite.
    """
    if not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def _subtract(a: Values, b: Values) -> Values:
    # inf - inf is NaN, for which `central_interval` returns None.
    with np.errstate(invalid="ignore"):
        return np.asarray(a - b)


def _counts(strata: Sequence[int], resamples: int, seed: int) -> Iterator[Values]:
    """Yield counts (resamples of a batch, units of all strata); those of a stratum add up to its size."""
    rng = np.random.default_rng(seed)
    batch = max(1, min(resamples, _MAX_COUNTS // sum(strata)))
    for i in range(math.ceil(resamples / batch)):
        rows = min(batch, resamples - i * batch)
        counts = [rng.multinomial(n, np.full(n, 1 / n), size=rows) for n in strata]
        yield np.concatenate(counts, axis=1).astype(np.float64)
