"""Standard errors, paired differences and retention, against numpy and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from laconic.evaluation.retention import Score, compare_scores, mean_retention, paired_stderr, rename_old_keys


def score(*parts: tuple[float, list[float]], task: str = "t", metric: str = "acc", high: bool = True) -> Score:
    arrays = tuple((w, np.array(x, float)) for w, x in parts)
    return Score(task, metric, sum(w * x.mean() for w, x in arrays), high, arrays, sum(len(x) for _, x in arrays))


def test_errors_are_numpys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 50)).astype(float)
    (row,) = compare_scores([score((1, a))], [score((1, b))])
    assert row["stderr"] == pytest.approx(a.std(ddof=1) / math.sqrt(50))
    assert row["difference_stderr"] == pytest.approx((a - b).std(ddof=1) / math.sqrt(50))
    assert row["retention"] == pytest.approx(a.mean() / b.mean())


def test_the_paired_error_is_that_of_resampled_documents() -> None:
    """Two tasks, weighed by their size, whose documents are hard for both models alike."""
    rng = np.random.default_rng(1)
    hard = [rng.normal(size=n) for n in (40, 120)]
    pairs = [(h + 0.3 * rng.normal(size=h.size), h + 0.3 * rng.normal(size=h.size)) for h in hard]
    weights = (0.25, 0.75)
    ours, theirs = (score(*((w, p[i]) for w, p in zip(weights, pairs, strict=True))) for i in (0, 1))
    drawn = []
    for _ in range(4000):
        picks = [rng.integers(0, h.size, h.size) for h in hard]
        drawn.append(sum(w * (a[i] - b[i]).mean() for w, (a, b), i in zip(weights, pairs, picks, strict=True)))
    found = paired_stderr(ours, theirs)
    assert found == pytest.approx(np.std(drawn), rel=0.05)
    assert ours.stderr is not None
    assert theirs.stderr is not None
    assert found < 0.5 * math.hypot(ours.stderr, theirs.stderr)


def test_a_task_counts_once_in_the_mean_retention() -> None:
    def of(factor: float) -> list[Score]:
        return [
            score((1, [factor * 0.5, 0.5]), task="a", metric="acc"),
            score((1, [factor * 0.4, factor * 0.4]), task="a", metric="acc_norm"),
            score((1, [factor * 30, factor * 30]), task="b", metric="perplexity", high=False),
            score((1, [factor * 1, factor * 1]), task="b", metric="acc"),
        ]

    rows = compare_scores(of(0.9), of(1))
    assert [row["main"] for row in rows] == [False, True, False, True]
    assert [row["retention"] for row in rows] == pytest.approx([0.95, 0.9, 1 / 0.9, 0.9])
    assert mean_retention(rows) == pytest.approx(0.9)


def test_what_cannot_be_known_is_not_told() -> None:
    unknown = Score("t", "f1", 0.5, True, None, 10)
    (row,) = compare_scores([unknown], [unknown])
    assert (row["stderr"], row["difference_stderr"], row["retention"]) == (None, None, 1)
    assert score((1, [1])).stderr is None
    rows = compare_scores([score((1, [0, 1]))], [score((1, [0, 0]))])
    assert (rows[0]["retention"], mean_retention(rows)) == (None, None)


def test_results_of_earlier_versions_are_read() -> None:
    old = {"mean_recovery": 0.9, "rows": [{"task": "a", "recovery": 0.9}], "subtasks": [], "limit": None}
    assert rename_old_keys(old) == {
        "mean_retention": 0.9,
        "rows": [{"task": "a", "retention": 0.9}],
        "subtasks": [],
        "limit": None,
    }
