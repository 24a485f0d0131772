"""Resampling: against draws written out, against the error that theory gives, and paired."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.evaluation.bootstrap import Ratio, draw, interval, mean_of, paired_interval, perplexity_of


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.integers(0, 1000))
def test_draws_are_means_of_drawn_values(values: list[float], seed: int) -> None:
    x = np.array(values)
    found = draw(mean_of(x), [len(x)], resamples=40, seed=seed)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=40)
    assert found == pytest.approx([np.repeat(x, row).mean() for row in counts])
    assert found.min() >= x.min() - 1e-12
    assert found.max() <= x.max() + 1e-12


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    x = np.random.default_rng(0).normal(size=500)
    low, high = interval(mean_of(x), [500], resamples=4000)
    error = x.std() / math.sqrt(500)
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = interval(mean_of(rng.normal(size=100)), [100], resamples=300)
        held += low <= 0 <= high
    assert 0.88 < held / 200 < 0.99


def test_pairing_takes_away_what_both_share() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(3, 1, 60)
    ours, theirs = perplexity_of(hard + 0.02 + 0.01 * rng.normal(size=60)), perplexity_of(hard)
    low, high = paired_interval(ours, theirs, [60])
    assert 0 < low < high
    mine, base = interval(ours, [60]), interval(theirs, [60])
    assert mine[0] < base[1]  # unpaired, nothing could be told
    assert high - low < (mine[1] - mine[0]) / 5


def test_every_kind_is_drawn_as_often_as_there_is_of_it() -> None:
    """Of two tasks whose documents are all alike nothing varies, however they differ from each other."""
    values = np.array([0.0] * 4 + [1.0] * 6)
    assert interval(mean_of(values), [4, 6]) == [0.6, 0.6]
    assert interval(mean_of(values), [10])[0] < 0.5


def test_pieces_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    of = mean_of(np.arange(50.0))
    whole = draw(of, [50], resamples=100)
    monkeypatch.setattr("laconic.evaluation.bootstrap._MAX_COUNTS", 350)
    assert draw(of, [50], resamples=100) == pytest.approx(whole)
    assert draw(of, [50], resamples=100, seed=1) != pytest.approx(whole)


def test_ratios_are_of_sums() -> None:
    of = Ratio(np.array([1.0, 10.0]), np.array([1.0, 5.0]))
    assert of(np.array([[1.0, 1.0], [2.0, 0.0]])) == pytest.approx([11 / 6, 1.0])


def test_one_unit_and_a_hopeless_model_have_no_interval() -> None:
    assert interval(mean_of(np.ones(1)), [1]) is None
    assert interval(perplexity_of(np.full(5, 1e4)), [5]) is None
