"""Calibration of confidence: expected calibration error, Brier score and reliability diagrams.

A prediction is the likeliest class (a choice of a question, a token of the vocabulary); its confidence is the
probability of that class. The expected calibration error (Naeini et al., AAAI 2015) uses bins with equal numbers of
predictions (Nixon et al., 1904.01685); bins of equal width would be mostly empty for next tokens. The Brier score
(Brier, 1950) is summed over all classes: 0 is perfect, 2 is certain and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.evaluation.bootstrap import Statistic, Values, central_interval, draw, mean_of

BINS = 15
CELLS = 1024


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model; arrays are (predictions,).

    Attributes:
        confidence: Probability of the likeliest class, in [0, 1].
        correct: 1 where the likeliest class is the right one, else 0.
        brier: Sum over classes of (probability - truth)^2.
        units: Index of the unit (a window of text, a document) of each prediction; units are resampled for intervals.
        strata: Number of units of each stratum, in order; they add up to all units.
    """

    confidence: Values
    correct: Values
    brier: Values
    units: NDArray[np.intp]
    strata: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(self.correct.mean())


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence.

    Attributes:
        count: Number of predictions.
        confidence: Mean confidence.
        accuracy: Share of correct predictions.
    """

    count: int
    confidence: float
    accuracy: float


def choice_predictions(log_likelihoods: Sequence[Sequence[float]], labels: Sequence[int]) -> Predictions:
    """Compute the predictions of a multiple-choice task.

    Probabilities are the softmax over the choices. Of equally likely choices the first is predicted, as in lm-eval.

    Args:
        log_likelihoods: Log-likelihoods of the choices of each document; documents may have different numbers of them.
        labels: Index of the right choice of each document.

    Returns:
        One prediction per document.
    """
    rows = np.empty((len(labels), 3))
    for i, (lls, label) in enumerate(zip(log_likelihoods, labels, strict=True)):
        p = np.exp(np.asarray(lls, dtype=np.float64) - np.max(lls))
        p /= p.sum()
        best = int(np.argmax(lls))
        rows[i] = p[best], best == label, (p**2).sum() - 2 * p[label] + 1
    confidence, correct, brier = rows.T.copy()
    return Predictions(confidence, correct, brier, np.arange(len(labels)), (len(labels),))


def concatenate(tasks: Sequence[Predictions]) -> Predictions:
    """Concatenate the predictions of a group of tasks; each task remains a stratum.

    Args:
        tasks: Predictions of each task.

    Returns:
        All predictions in order, with the units of later tasks numbered after those of earlier ones.
    """
    starts = np.cumsum([0, *(sum(t.strata) for t in tasks)])
    return Predictions(
        np.concatenate([t.confidence for t in tasks]),
        np.concatenate([t.correct for t in tasks]),
        np.concatenate([t.brier for t in tasks]),
        np.concatenate([t.units + start for t, start in zip(tasks, starts, strict=False)]),
        tuple(n for t in tasks for n in t.strata),
    )


def reliability(predictions: Predictions, bins: int = BINS) -> list[Bin]:
    """Sort predictions into bins of equal size, from the least confident to the most confident.

    There are fewer bins if there are fewer predictions. Predictions of equal confidence at the edge of a bin are
    divided between the bins at their average, so that the order of predictions does not matter.

    Args:
        predictions: The predictions.
        bins: Largest number of bins.

    Returns:
        The bins, each with at least one prediction.
    """
    order, starts = _sort(predictions)
    columns = (np.ones(len(order)), predictions.confidence[order], predictions.correct[order])
    ones, confidence, correct = (np.add.reduceat(c, starts) for c in columns)
    sums = zip(*_bin_sums(ones, confidence, correct, bins), strict=True)
    return [Bin(round(n), float(c / n), float(a / n)) for n, c, a in sums if n > 0]


def ece(predictions: Predictions, bins: int = BINS) -> float:
    """Compute the expected calibration error (Naeini et al., AAAI 2015) over bins of equal size (1904.01685).

    It is the mean of |confidence - accuracy| of the bins, weighted by their numbers of predictions.

    Args:
        predictions: The predictions.
        bins: Largest number of bins.

    Returns:
        The error, in [0, 1].
    """
    total = sum(b.count * abs(b.confidence - b.accuracy) for b in reliability(predictions, bins))
    return total / len(predictions.correct)


def ece_of(predictions: Predictions, bins: int = BINS) -> Statistic:
    """Return the expected calibration error as a statistic of resampled units, with new bins for every resample.

    It is exact if units have one prediction each. If they have more, predictions of similar confidence are merged into
    at most `CELLS` cells, and a bin edge within a cell divides it as if its predictions were equal.

    Args:
        predictions: The predictions.
        bins: Largest number of bins.
    """
    order, starts = _sort(predictions)
    values = (np.ones(len(order)), predictions.confidence[order], predictions.correct[order])
    units, number = predictions.units[order], sum(predictions.strata)
    if len(order) == number:

        def sums_of(counts: Values) -> list[Values]:
            drawn = counts[:, units]
            return [np.add.reduceat(drawn * column, starts, axis=1) for column in values]
    else:
        tables = _cell_tables(values, units, number, starts)

        def sums_of(counts: Values) -> list[Values]:
            return [counts @ table for table in tables]

    def statistic(counts: Values) -> Values:
        errors = np.empty(len(counts))
        for i, (ones, confidence, correct) in enumerate(zip(*sums_of(counts), strict=True)):
            n, c, a = _bin_sums(ones, confidence, correct, bins)
            errors[i] = np.abs(c - a).sum() / n.sum()
        return errors

    return statistic


def _cell_tables(
    values: Sequence[Values], units: NDArray[np.intp], number: int, starts: NDArray[np.intp]
) -> list[Values]:
    """Sum values, sorted by confidence, by unit and cell: a table (units, cells) for each of them."""
    length = len(units)
    cells = np.repeat(np.arange(len(starts)), np.diff([*starts, length]))
    if len(starts) > CELLS:
        cells = np.arange(length) * CELLS // length
    width = int(cells[-1]) + 1
    return [
        np.bincount(units * width + cells, v, number * width).astype(np.float64).reshape(number, width) for v in values
    ]


def brier_of(predictions: Predictions) -> Statistic:
    """Return the mean Brier score as a statistic of resampled units, which have equal numbers of predictions.

    Args:
        predictions: The predictions.
    """
    sizes = np.bincount(predictions.units, minlength=sum(predictions.strata))
    return mean_of(np.bincount(predictions.units, weights=predictions.brier, minlength=len(sizes)) / sizes)


def compare_calibration(model: Predictions, baseline: Predictions | None) -> dict[str, Any]:
    """Compute ECE, Brier score and accuracy with 95 % intervals and bins; with an original, paired differences.

    Args:
        model: Predictions of the model.
        baseline: Predictions of its original on the same documents, if there is one.

    Returns:
        The value of the key `calibration` of a result.
    """
    assert baseline is None or baseline.strata == model.strata
    result: dict[str, Any] = {"bins": BINS, "predictions": len(model.correct)}
    values, draws = _measure(model)
    result |= values
    if baseline is not None:
        baseline_values, baseline_draws = _measure(baseline)
        result |= {f"baseline_{key}": value for key, value in baseline_values.items()}
        for name in draws:
            result[f"{name}_difference"] = values[name] - baseline_values[name]
            result[f"{name}_difference_interval"] = _interval(draws[name] - baseline_draws[name], model)
    return result


def _measure(predictions: Predictions) -> tuple[dict[str, Any], dict[str, Values]]:
    """Compute the figures of one model, and the resampled values of those that have an interval."""
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
    return central_interval(draws) if min(predictions.strata) > 1 else None


def _sort(predictions: Predictions) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of predictions by confidence, and the index in it of the first one of each confidence."""
    order = np.argsort(predictions.confidence, kind="stable")
    return order, np.unique(predictions.confidence[order], return_index=True)[1]


def _bin_sums(ones: Values, confidence: Values, correct: Values, bins: int) -> tuple[Values, Values, Values]:
    """Compute the sums of three columns, sorted by confidence, over bins of equal size.

    The first bins have one prediction more if needed, as in numpy.array_split. Cumulative sums are linear between two
    confidences, because predictions of equal confidence are alike; a bin is a difference of interpolated values.
    """
    count = np.cumsum(ones)
    total = round(count[-1])
    size, remainder = divmod(total, bins)
    edges = [b * size + min(b, remainder) for b in range(bins + 1)]
    upto = [np.interp(edges, np.append(0, count), np.append(0, np.cumsum(v))) for v in (confidence, correct)]
    return np.diff(np.asarray(edges, dtype=np.float64)), np.diff(upto[0]), np.diff(upto[1])
