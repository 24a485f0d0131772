"""A compressed model's task results beside its original's: standard errors, paired differences, what is recovered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.evaluate.bootstrap import Ratio, exp, interval, mean_of, paired, perplexity_of

Values = NDArray[np.float64]

# By lm-eval's name of an aggregation: from the documents' scores (for the last two, pairs of a log-likelihood and its
# words or bytes) to a statistic that can be resampled.
_STATISTIC: Mapping[str, Callable[[Values], Ratio]] = {
    "mean": mean_of,
    "perplexity": lambda scores: perplexity_of(-scores),
    "weighted_perplexity": lambda pairs: Ratio(-pairs[:, 0], pairs[:, 1], exp),
    "bits_per_byte": lambda pairs: Ratio(-pairs[:, 0], pairs[:, 1], lambda nats: nats / math.log(2)),
}
# From the same to numbers whose mean has the same sampling error (the delta method). A perplexity is exp(-mean).
_LINEAR: Mapping[str, Callable[[Values], Values]] = {
    "mean": lambda scores: scores,
    "perplexity": lambda scores: -np.exp(-scores.mean()) * scores,
    "weighted_perplexity": lambda pairs: -math.exp(_mean(pairs)) * _excess(pairs),
    "bits_per_byte": lambda pairs: -_excess(pairs) / math.log(2),
}
# A task of several metrics counts once in the mean recovery, by the first of these that it has.
_MAIN = ("acc_norm", "acc", "exact_match", "score")


@dataclass(frozen=True)
class Score:
    """One metric of a task, or of a group of tasks, for one model.

    metric: its name, with lm-eval's filter where that is not `none`. parts: for each task of it a weight (they add up
    to 1) and a number a document, whose mean has the sampling error of the metric; None where that is not known.
    sampled: likewise, the metric itself as a statistic of documents drawn again.
    """

    task: str
    metric: str
    value: float
    higher_is_better: bool
    parts: tuple[tuple[float, Values], ...] | None
    documents: int
    tasks: int = 1
    sampled: tuple[tuple[float, Ratio], ...] | None = None

    def drawn(self, counts: Values) -> Values:
        """The value for each resample of documents, the tasks' side by side: counts (resamples, documents)."""
        assert self.sampled is not None
        ends = np.cumsum(self.strata)[:-1]
        pieces = np.split(counts, ends, axis=1)
        total: Values = sum(
            (w * of(piece) for (w, of), piece in zip(self.sampled, pieces, strict=True)), np.zeros(len(counts))
        )
        return total

    @property
    def strata(self) -> list[int]:
        """How many documents each task of it has."""
        return [len(of.a) for _, of in self.sampled or ()]

    @property
    def stderr(self) -> float | None:
        """Standard error of the value, over documents; None where it is not known."""
        return None if self.parts is None else _stderr(self.parts)


def read_scores(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task in what `simple_evaluate` returned. tasks: the tasks themselves, by name."""
    found = []
    for name, task in tasks.items():
        for metric, chosen, value in _metrics(results, name):
            how = getattr(task.aggregation().get(metric), "__name__", "")
            raw = [s[metric] for s in results["samples"][name] if s["filter"] == chosen and metric in s]
            parts = sampled = None
            if how in _LINEAR:
                scores = np.asarray(raw, dtype=np.float64)
                parts, sampled = ((1.0, _LINEAR[how](scores)),), ((1.0, _STATISTIC[how](scores)),)
            better = bool(task.higher_is_better().get(metric, True))
            found.append(Score(name, _spelled(metric, chosen), value, better, parts, len(raw), sampled=sampled))
    return found


def read_groups(results: Mapping[str, Any], groups: Mapping[str, Any], scores: Sequence[Score]) -> list[Score]:
    """The metrics that lm-eval takes together for groups. scores: of their tasks. Tasks are strata: a group's error is
    that of its tasks, not of which tasks it has."""
    found = []
    for name, group in groups.items():
        members = {task.task_name for task in group.get_all_tasks()}
        weighed = {how.metric: how.weight_by_size for how in group.aggregate_metric_list or ()}
        for metric, chosen, value in _metrics(results, name):
            own = [s for s in scores if s.task in members and s.metric == _spelled(metric, chosen)]
            documents = sum(s.documents for s in own)
            weights = [s.documents / documents if weighed[metric] else 1 / len(own) for s in own]
            parts = [(w * v, values) for w, s in zip(weights, own, strict=True) for v, values in s.parts or ()]
            sampled = [(w * v, of) for w, s in zip(weights, own, strict=True) for v, of in s.sampled or ()]
            found.append(
                Score(
                    name,
                    _spelled(metric, chosen),
                    value,
                    own[0].higher_is_better,
                    tuple(parts) if len(parts) == len(own) else None,
                    documents,
                    len(own),
                    tuple(sampled) if len(sampled) == len(own) else None,
                )
            )
    return found


def compare(ours: Sequence[Score], theirs: Sequence[Score] | None) -> list[dict[str, Any]]:
    """A row a metric: the model's value, and beside its original's the difference and the recovery.

    Both saw the same documents, so the error of the difference is that of the documents' differences, and its 95 %
    interval of the same documents drawn again for both. Recovery is the
    part of the original's value that is left (for a metric that should be low, the inverse). main: whether the row
    stands for its task in the mean recovery.
    """
    original = {(s.task, s.metric): s for s in theirs or ()}
    rows = []
    for score in ours:
        row: dict[str, Any] = {
            "task": score.task,
            "metric": score.metric,
            "main": score.metric == _main_metric([s.metric for s in ours if s.task == score.task]),
            "higher_is_better": score.higher_is_better,
            "tasks": score.tasks,
            "documents": score.documents,
            "value": score.value,
            "stderr": score.stderr,
            "interval": interval(score.drawn, score.strata) if score.sampled else None,
        }
        if theirs is not None:
            base = original[score.task, score.metric]
            row |= {
                "baseline": base.value,
                "baseline_stderr": base.stderr,
                "baseline_interval": interval(base.drawn, base.strata) if base.sampled else None,
                "difference": score.value - base.value,
                "difference_stderr": paired_stderr(score, base),
                "difference_interval": (
                    paired(score.drawn, base.drawn, score.strata) if score.sampled and base.sampled else None
                ),
                "recovery": _recovery(score, base),
            }
        rows.append(row)
    return rows


def mean_recovery(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Over tasks, each by its main metric; None where a task has none."""
    found = [row.get("recovery") for row in rows if row["main"]]
    known = [r for r in found if r is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None


def paired_stderr(ours: Score, theirs: Score) -> float | None:
    """Standard error of the difference of two models' values on the same documents; None where it is not known."""
    if ours.parts is None or theirs.parts is None:
        return None
    return _stderr([(w, a - b) for (w, a), (_, b) in zip(ours.parts, theirs.parts, strict=True)])


def _mean(pairs: Values) -> float:
    """Of pairs of a log-likelihood and its words, the negative log-likelihood a word."""
    return -float(pairs[:, 0].sum() / pairs[:, 1].sum())


def _excess(pairs: Values) -> Values:
    """What each document's log-likelihood is above that of as many words at the mean, a mean document's words being 1:
    numbers that vary as the ratio of the sums does."""
    excess: Values = (pairs[:, 0] + _mean(pairs) * pairs[:, 1]) / pairs[:, 1].mean()
    return excess


def _stderr(parts: Sequence[tuple[float, Values]]) -> float | None:
    if any(len(values) < 2 for _, values in parts):
        return None
    return math.sqrt(sum(weight**2 * values.var(ddof=1) / len(values) for weight, values in parts))


def _recovery(ours: Score, theirs: Score) -> float | None:
    above, below = (ours.value, theirs.value) if ours.higher_is_better else (theirs.value, ours.value)
    return above / below if below else None


def _main_metric(metrics: Sequence[str]) -> str:
    return next((m for name in _MAIN for m in metrics if m.partition(" ")[0] == name), metrics[0])


def _metrics(results: Mapping[str, Any], name: str) -> list[tuple[str, str, float]]:
    """Metric, filter and value; lm-eval writes them as `metric,filter`, between other things."""
    found = [(*key.partition(",")[::2], value) for key, value in results["results"][name].items()]
    return [
        (metric, chosen, float(value))
        for metric, chosen, value in found
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


def _spelled(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric} ({chosen})"
