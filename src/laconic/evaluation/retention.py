"""Task scores of a compressed model beside its original's: standard errors, paired differences, retention.

Retention is the share of the original's score that the compressed model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laconic.evaluation.bootstrap import Ratio, Values, exp, interval, mean_of, paired_interval, perplexity_of

# For each of lm-eval's aggregations a statistic that can be resampled, from the scores of the documents; for the last
# two these are pairs of a log-likelihood and a number of words or bytes.
_STATISTIC: Mapping[str, Callable[[Values], Ratio]] = {
    "mean": mean_of,
    "perplexity": lambda scores: perplexity_of(-scores),
    "weighted_perplexity": lambda pairs: Ratio(-pairs[:, 0], pairs[:, 1], exp),
    "bits_per_byte": lambda pairs: Ratio(-pairs[:, 0], pairs[:, 1], lambda nats: nats / math.log(2)),
}
# From the same scores, numbers whose mean has the same sampling error (delta method). A perplexity is exp(-mean).
_LINEAR: Mapping[str, Callable[[Values], Values]] = {
    "mean": lambda scores: scores,
    "perplexity": lambda scores: -np.exp(-scores.mean()) * scores,
    "weighted_perplexity": lambda pairs: -math.exp(_nll_per_word(pairs)) * _excess(pairs),
    "bits_per_byte": lambda pairs: -_excess(pairs) / math.log(2),
}
# The mean retention counts a task once, by the first of these metrics that the task has.
_MAIN = ("acc_norm", "acc", "exact_match", "score")
# Keys of results written by earlier versions, and their present names.
_RENAMED_KEYS = {"recovery": "retention", "mean_recovery": "mean_retention"}


@dataclass(frozen=True)
class Score:
    """One metric of a task, or of a group of tasks, for one model.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric, with lm-eval's filter unless that is `none`.
        value: The score.
        higher_is_better: Whether a higher value is better.
        parts: For each task its weight (the weights add up to 1) and a number per document, whose mean has the sampling
            error of the metric; None if the error is not known.
        documents: Number of documents.
        tasks: Number of tasks.
        sampled: For each task its weight and the metric as a statistic of resampled documents; None if not known.
    """

    task: str
    metric: str
    value: float
    higher_is_better: bool
    parts: tuple[tuple[float, Values], ...] | None
    documents: int
    tasks: int = 1
    sampled: tuple[tuple[float, Ratio], ...] | None = None

    def statistic(self, counts: Values) -> Values:
        """Compute the value of each resample.

        Args:
            counts: (resamples, documents of all tasks) how often each document was drawn.

        Returns:
            (resamples,) values.
        """
        assert self.sampled is not None
        ends = np.cumsum(self.strata)[:-1]
        pieces = np.split(counts, ends, axis=1)
        total: Values = sum(
            (w * of(piece) for (w, of), piece in zip(self.sampled, pieces, strict=True)), np.zeros(len(counts))
        )
        return total

    @property
    def strata(self) -> list[int]:
        """Number of documents of each task."""
        return [len(of.a) for _, of in self.sampled or ()]

    @property
    def stderr(self) -> float | None:
        """Standard error of the value over documents; None if it is not known."""
        return None if self.parts is None else _stderr(self.parts)


def read_scores(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Score]:
    """Read every metric of every task.

    Args:
        results: Result of lm-eval's `simple_evaluate`.
        tasks: lm-eval's tasks by name.

    Returns:
        One score per task, metric and filter.
    """
    scores = []
    for name, task in tasks.items():
        for metric, filter_name, value in _metrics(results, name):
            aggregation = getattr(task.aggregation().get(metric), "__name__", "")
            raw = [s[metric] for s in results["samples"][name] if s["filter"] == filter_name and metric in s]
            parts = sampled = None
            if aggregation in _LINEAR:
                values = np.asarray(raw, dtype=np.float64)
                parts, sampled = ((1.0, _LINEAR[aggregation](values)),), ((1.0, _STATISTIC[aggregation](values)),)
            higher_is_better = bool(task.higher_is_better().get(metric, True))
            label = _label(metric, filter_name)
            scores.append(Score(name, label, value, higher_is_better, parts, len(raw), sampled=sampled))
    return scores


def read_groups(results: Mapping[str, Any], groups: Mapping[str, Any], scores: Sequence[Score]) -> list[Score]:
    """Read the metrics that lm-eval aggregates over groups of tasks.

    Tasks are strata: the error of a group comes from the documents of its tasks, not from the choice of the tasks.

    Args:
        results: Result of lm-eval's `simple_evaluate`.
        groups: lm-eval's groups by name.
        scores: The scores of their tasks.

    Returns:
        One score per group, metric and filter.
    """
    group_scores = []
    for name, group in groups.items():
        tasks = {task.task_name for task in group.get_all_tasks()}
        by_size = {a.metric: a.weight_by_size for a in group.aggregate_metric_list or ()}
        for metric, filter_name, value in _metrics(results, name):
            label = _label(metric, filter_name)
            members = [s for s in scores if s.task in tasks and s.metric == label]
            documents = sum(s.documents for s in members)
            weights = [s.documents / documents if by_size[metric] else 1 / len(members) for s in members]
            parts = [(w * v, values) for w, s in zip(weights, members, strict=True) for v, values in s.parts or ()]
            sampled = [(w * v, of) for w, s in zip(weights, members, strict=True) for v, of in s.sampled or ()]
            group_scores.append(
                Score(
                    name,
                    label,
                    value,
                    members[0].higher_is_better,
                    tuple(parts) if len(parts) == len(members) else None,
                    documents,
                    len(members),
                    tuple(sampled) if len(sampled) == len(members) else None,
                )
            )
    return group_scores


def compare_scores(scores: Sequence[Score], baseline: Sequence[Score] | None) -> list[dict[str, Any]]:
    """Compare a model's scores with its original's, one row per score.

    Both models have the same documents, so the error of a difference is that of the documents' differences, and its
    95 % interval uses the same resamples for both.

    Args:
        scores: Scores of the model.
        baseline: Scores of its original, if there is one.

    Returns:
        Rows with the value, its standard error and interval; with an original also its value, the paired difference,
        and `retention`, value / original (inverted for metrics where lower is better). `main` is true for the metric
        by which its task counts in the mean retention.
    """
    originals = {(s.task, s.metric): s for s in baseline or ()}
    rows = []
    for score in scores:
        row: dict[str, Any] = {
            "task": score.task,
            "metric": score.metric,
            "main": score.metric == _main_metric([s.metric for s in scores if s.task == score.task]),
            "higher_is_better": score.higher_is_better,
            "tasks": score.tasks,
            "documents": score.documents,
            "value": score.value,
            "stderr": score.stderr,
            "interval": interval(score.statistic, score.strata) if score.sampled else None,
        }
        if baseline is not None:
            row |= _comparison(score, originals[score.task, score.metric])
        rows.append(row)
    return rows


def _comparison(score: Score, original: Score) -> dict[str, Any]:
    difference_interval = None
    if score.sampled and original.sampled:
        difference_interval = paired_interval(score.statistic, original.statistic, score.strata)
    return {
        "baseline": original.value,
        "baseline_stderr": original.stderr,
        "baseline_interval": interval(original.statistic, original.strata) if original.sampled else None,
        "difference": score.value - original.value,
        "difference_stderr": paired_stderr(score, original),
        "difference_interval": difference_interval,
        "retention": _retention(score, original),
    }


def mean_retention(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Compute the mean retention over tasks, each by its main metric.

    Args:
        rows: Rows of `compare_scores`.

    Returns:
        The mean; None if there is no task, or if one has no retention (no original, or a division by 0).
    """
    values = [row.get("retention") for row in rows if row["main"]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def rename_old_keys(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result of tasks with the present names of keys that earlier versions wrote under other names.

    Args:
        result: Result of `laconic eval tasks`, or one of its rows; it is not changed.
    """
    renamed = {_RENAMED_KEYS.get(key, key): value for key, value in result.items()}
    for key in ("rows", "subtasks"):
        if isinstance(renamed.get(key), list):
            renamed[key] = [rename_old_keys(row) if isinstance(row, dict) else row for row in renamed[key]]
    return renamed


def paired_stderr(score: Score, baseline: Score) -> float | None:
    """Compute the standard error of the difference of two models' scores on the same documents.

    Args:
        score: Score of the model.
        baseline: Score of its original.

    Returns:
        The standard error; None if it is not known, or if a task has fewer than two documents.
    """
    if score.parts is None or baseline.parts is None:
        return None
    return _stderr([(w, a - b) for (w, a), (_, b) in zip(score.parts, baseline.parts, strict=True)])


def _nll_per_word(pairs: Values) -> float:
    """Compute the negative log-likelihood per word from pairs (log-likelihood, words)."""
    return -float(pairs[:, 0].sum() / pairs[:, 1].sum())


def _excess(pairs: Values) -> Values:
    """Compute numbers per document that vary as the ratio of the sums of pairs (log-likelihood, words) does.

    It is each document's log-likelihood less that of as many words at the mean, divided by the mean number of words.
    """
    excess: Values = (pairs[:, 0] + _nll_per_word(pairs) * pairs[:, 1]) / pairs[:, 1].mean()
    return excess


def _stderr(parts: Sequence[tuple[float, Values]]) -> float | None:
    if any(len(values) < 2 for _, values in parts):
        return None
    return math.sqrt(sum(weight**2 * values.var(ddof=1) / len(values) for weight, values in parts))


def _retention(score: Score, original: Score) -> float | None:
    values = (score.value, original.value)
    numerator, denominator = values if score.higher_is_better else reversed(values)
    return numerator / denominator if denominator else None


def _main_metric(metrics: Sequence[str]) -> str:
    return next((m for name in _MAIN for m in metrics if m.partition(" ")[0] == name), metrics[0])


def _metrics(results: Mapping[str, Any], name: str) -> list[tuple[str, str, float]]:
    """Read metric, filter and value of a task; lm-eval writes them as `metric,filter` among other keys."""
    entries = [(*key.partition(",")[::2], value) for key, value in results["results"][name].items()]
    return [
        (metric, filter_name, float(value))
        for metric, filter_name, value in entries
        if filter_name and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"
