"""A compressed model's task results beside its original's: standard errors, paired differences, what is recovered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# By lm-eval's name of an aggregation: from the documents' scores to numbers whose mean has the same sampling error (the
# delta method). Perplexity is exp(-mean log-likelihood).
_LINEAR: Mapping[str, Callable[[Values], Values]] = {
    "mean": lambda scores: scores,
    "perplexity": lambda scores: -np.exp(-scores.mean()) * scores,
}
# A task of several metrics counts once in the mean recovery, by the first of these that it has.
_MAIN = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class Score:
    """One metric of a task, or of a group of tasks, for one model.

    metric: its name, with lm-eval's filter where that is not `none`. parts: for each task of it a weight (they add up
    to 1) and a number a document, whose mean has the sampling error of the metric; None where that is not known.
    """

    task: str
    metric: str
    value: float
    higher_is_better: bool
    parts: tuple[tuple[float, Values], ...] | None
    documents: int
    tasks: int = 1

    @property
    def stderr(self) -> float | None:
        """Standard error of the value, over documents; None where it is not known."""
        return None if self.parts is None else _stderr(self.parts)


def read_scores(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Score]:
    """Every metric of every task in what `simple_evaluate` returned. tasks: the tasks themselves, by name."""
    found = []
    for name, task in tasks.items():
        for metric, chosen, value in _metrics(results, name):
            linear = _LINEAR.get(getattr(task.aggregation().get(metric), "__name__", ""))
            raw = [s[metric] for s in results["samples"][name] if s["filter"] == chosen and metric in s]
            parts = ((1.0, linear(np.asarray(raw, dtype=np.float64))),) if linear else None
            better = bool(task.higher_is_better().get(metric, True))
            found.append(Score(name, _spelled(metric, chosen), value, better, parts, len(raw)))
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
            found.append(
                Score(
                    name,
                    _spelled(metric, chosen),
                    value,
                    own[0].higher_is_better,
                    tuple(parts) if len(parts) == len(own) else None,
                    documents,
                    len(own),
                )
            )
    return found


def compare(ours: Sequence[Score], theirs: Sequence[Score] | None) -> list[dict[str, Any]]:
    """A row a metric: the model's value, and beside its original's the difference and the recovery.

    Both saw the same documents, so the error of the difference is that of the documents' differences. Recovery is the
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
        }
        if theirs is not None:
            base = original[score.task, score.metric]
            row |= {
                "baseline": base.value,
                "baseline_stderr": base.stderr,
                "difference": score.value - base.value,
                "difference_stderr": paired_stderr(score, base),
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
