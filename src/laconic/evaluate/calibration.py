"""Whether a model is as sure as it is right: expected calibration error, Brier score, reliability.

A prediction is the likeliest of the classes (choices of a question, tokens of the vocabulary), its confidence their
probability. Expected calibration error after Naeini et al. (AAAI 2015), in bins that hold equally many predictions
(Nixon et al., 1904.01685) rather than in equal steps of confidence, of which most would be empty for next tokens. Brier
score after Brier (1950), over all classes: 0 is perfect, 2 wholly sure and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.evaluate.bootstrap import Statistic, between, draw, mean_of

Values = NDArray[np.float64]
BINS = 15
CELLS = 1024


@dataclass(frozen=True)
class Predictions:
    """confidence: of the likeliest class, in [0, 1]; right: 1 where it was the one, else 0; brier: sum over classes of
    (probability - truth)^2. All (predictions,).

    units: (predictions,) the index of what is drawn again for an interval (a window of text, a document) that each
    belongs to. strata: how many units there are of each kind, in order; they add up to all units.
    """

    confidence: Values
    right: Values
    brier: Values
    units: NDArray[np.intp]
    strata: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return float(self.right.mean())


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence: how many, their mean confidence, the share of them that are right."""

    count: int
    confidence: float
    accuracy: float


def of_choices(log_likelihoods: Sequence[Sequence[float]], labels: Sequence[int]) -> Predictions:
    """Predictions of a multiple-choice task: of every document, log-likelihoods of its choices (they may be of
    different number) and the index of the right one. Probabilities are the softmax over choices; of choices that are
    equally likely the first is taken, as lm-eval does."""
    found = np.empty((len(labels), 3))
    for i, (lls, label) in enumerate(zip(log_likelihoods, labels, strict=True)):
        p = np.exp(np.asarray(lls, dtype=np.float64) - np.max(lls))
        p /= p.sum()
        best = int(np.argmax(lls))
        found[i] = p[best], best == label, (p**2).sum() - 2 * p[label] + 1
    confidence, right, brier = found.T.copy()
    return Predictions(confidence, right, brier, np.arange(len(labels)), (len(labels),))


def pooled(tasks: Sequence[Predictions]) -> Predictions:
    """The predictions of a group of tasks together; each task stays a kind of its own when units are drawn again."""
    starts = np.cumsum([0, *(sum(t.strata) for t in tasks)])
    return Predictions(
        np.concatenate([t.confidence for t in tasks]),
        np.concatenate([t.right for t in tasks]),
        np.concatenate([t.brier for t in tasks]),
        np.concatenate([t.units + start for t, start in zip(tasks, starts, strict=False)]),
        tuple(n for t in tasks for n in t.strata),
    )


def reliability(predictions: Predictions, bins: int = BINS) -> list[Bin]:
    """Bins of equally many predictions, from the least confident to the most; fewer than asked for where there are
    fewer predictions than bins. Where equal confidences stand at the edge of a bin, each bin takes its part of them as
    they are on average, so that the order of predictions does not matter."""
    order, starts = _sorted(predictions)
    columns = (np.ones(len(order)), predictions.confidence[order], predictions.right[order])
    ones, confidence, right = (np.add.reduceat(c, starts) for c in columns)
    sums = zip(*_bin_sums(ones, confidence, right, bins), strict=True)
    return [Bin(round(n), float(c / n), float(a / n)) for n, c, a in sums if n > 0]


def ece(predictions: Predictions, bins: int = BINS) -> float:
    """Expected calibration error: the mean over predictions of how far their bin's confidence is from its accuracy."""
    found = reliability(predictions, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in found) / len(predictions.right)


def ece_of(predictions: Predictions, bins: int = BINS) -> Statistic:
    """The same as a statistic of resampled units; bins are cut anew for every resample.

    Where units have many predictions, those next to each other in confidence are taken together in `CELLS` cells, and
    a bin's edge within a cell divides it as if they were equal; otherwise it is exact."""
    order, starts = _sorted(predictions)
    confidence, right = predictions.confidence[order], predictions.right[order]
    units, number = predictions.units[order], sum(predictions.strata)
    alone = len(order) == number

    cells = np.repeat(np.arange(len(starts)), np.diff([*starts, len(order)]))
    if not alone and len(starts) > CELLS:
        cells = np.arange(len(order)) * CELLS // len(order)
    width = int(cells[-1]) + 1
    tables = []
    for column in (np.ones(len(order)), confidence, right):
        if alone:
            break
        tables.append(np.bincount(units * width + cells, column, number * width).reshape(number, width))

    def of(counts: Values) -> Values:
        if alone:
            drawn = counts[:, units]
            sums = [np.add.reduceat(drawn * c, starts, axis=1) for c in (1.0, confidence, right)]
        else:
            sums = [counts @ table for table in tables]
        found = np.empty(len(counts))
        for i, (ones, sure, hits) in enumerate(zip(*sums, strict=True)):
            n, c, a = _bin_sums(ones, sure, hits, bins)
            found[i] = np.abs(c - a).sum() / n.sum()
        return found

    return of


def brier_of(predictions: Predictions) -> Statistic:
    """The mean Brier score as a statistic of resampled units, which have equally many predictions."""
    sizes = np.bincount(predictions.units, minlength=sum(predictions.strata))
    return mean_of(np.bincount(predictions.units, weights=predictions.brier, minlength=len(sizes)) / sizes)


def calibration_of(ours: Predictions, theirs: Predictions | None) -> dict[str, Any]:
    """ECE, Brier score and accuracy with their 95 % intervals and bins; beside the original's, paired differences.

    Returns: what is written to `results/`.
    """
    assert theirs is None or theirs.strata == ours.strata
    found: dict[str, Any] = {"bins": BINS, "predictions": len(ours.right)}
    values, draws = _one(ours)
    found |= values
    if theirs is not None:
        base, base_draws = _one(theirs)
        found |= {f"baseline_{key}": value for key, value in base.items()}
        for name in draws:
            found[f"{name}_difference"] = values[name] - base[name]
            found[f"{name}_difference_interval"] = _interval(draws[name] - base_draws[name], ours)
    return found


def _one(predictions: Predictions) -> tuple[dict[str, Any], dict[str, Values]]:
    """The figures of one model, and of those that have an interval the draws."""
    draws = {
        "ece": draw(ece_of(predictions), predictions.strata),
        "brier": draw(brier_of(predictions), predictions.strata),
    }
    values = {
        "accuracy": predictions.accuracy,
        "confidence": float(predictions.confidence.mean()),
        "ece": ece(predictions),
        "brier": float(predictions.brier.mean()),
        "reliability": [vars(b) for b in reliability(predictions)],
    }
    return values | {f"{name}_interval": _interval(drawn, predictions) for name, drawn in draws.items()}, draws


def _interval(draws: Values, predictions: Predictions) -> list[float] | None:
    return between(draws) if min(predictions.strata) > 1 else None


def _sorted(predictions: Predictions) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Predictions in the order of confidence, and where in it each new confidence begins."""
    order = np.argsort(predictions.confidence, kind="stable")
    return order, np.unique(predictions.confidence[order], return_index=True)[1]


def _bin_sums(ones: Values, confidence: Values, right: Values, bins: int) -> tuple[Values, Values, Values]:
    """Of bins that hold equally many (the first ones one more, as numpy.array_split does), the sums of the three.

    Each: (values of confidence in order). Sums up to n predictions are linear between two values, equal ones being
    alike, so a bin is the difference of two places on that line."""
    count = np.cumsum(ones)
    total = round(count[-1])
    each, more = divmod(total, bins)
    edges = [b * each + min(b, more) for b in range(bins + 1)]
    upto = [np.interp(edges, np.append(0, count), np.append(0, np.cumsum(v))) for v in (confidence, right)]
    return np.diff(np.asarray(edges, dtype=np.float64)), np.diff(upto[0]), np.diff(upto[1])
