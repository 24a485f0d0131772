"""ECE, Brier score and reliability against plain float64 loops, and lm-eval's own Brier score."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.evaluation.bootstrap import draw
from laconic.evaluation.calibration import (
    CELLS,
    Predictions,
    brier_of,
    choice_predictions,
    compare_calibration,
    concatenate,
    ece,
    ece_of,
    reliability,
)
from laconic.evaluation.fidelity import observe


def made(confidence: list[float], right: list[float], units: list[int] | None = None) -> Predictions:
    one = np.arange(len(confidence)) if units is None else np.array(units)
    return Predictions(np.array(confidence), np.array(right), np.zeros(len(right)), one, (int(one.max()) + 1,))


def plain_ece(confidence: list[float], right: list[float], bins: int) -> float:
    """Sorted, cut by numpy.array_split, each bin's gap weighed by its share."""
    pairs = sorted(zip(confidence, right, strict=True))
    total = 0.0
    for part in np.array_split(np.arange(len(pairs)), bins):
        if len(part):
            sure = math.fsum(pairs[i][0] for i in part) / len(part)
            correct = math.fsum(pairs[i][1] for i in part) / len(part)
            total += len(part) / len(pairs) * abs(sure - correct)
    return total


SURE = st.floats(0, 1, allow_subnormal=False)
DISTINCT = st.lists(SURE, min_size=1, max_size=80, unique=True)


@given(DISTINCT, st.integers(1, 20), st.randoms())
def test_ece_is_that_of_the_plain_loop(confidence: list[float], bins: int, chance: Any) -> None:
    right = [float(chance.random() < 0.5) for _ in confidence]
    assert ece(made(confidence, right), bins) == pytest.approx(plain_ece(confidence, right, bins), abs=1e-12)


@given(
    st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1), st.randoms()
)
def test_the_order_of_predictions_does_not_matter(pairs: list[tuple[float, float]], chance: Any) -> None:
    """Ties stand at the edges of bins, where a sort alone would let the order decide."""
    before = ece(made(*map(list, zip(*pairs, strict=True))))
    chance.shuffle(pairs)
    assert ece(made(*map(list, zip(*pairs, strict=True)))) == pytest.approx(before, abs=1e-12)


@given(DISTINCT, st.randoms())
def test_bins_hold_equally_many_and_everything(confidence: list[float], chance: Any) -> None:
    right = [float(chance.random() < 0.5) for _ in confidence]
    found = reliability(made(confidence, right))
    counts = [b.count for b in found]
    assert sum(counts) == len(confidence)
    assert max(counts) - min(counts) <= 1
    assert len(found) == min(15, len(confidence))
    assert all(a.confidence <= b.confidence for a, b in pairwise(found))
    assert math.fsum(b.count * b.accuracy for b in found) == pytest.approx(sum(right), abs=1e-9)
    # Never less than the gap over all, never more than the largest there can be.
    assert abs(np.mean(confidence) - np.mean(right)) - 1e-9 <= ece(made(confidence, right)) <= 1


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_a_resample_has_the_ece_of_what_was_drawn(units: int, each: int, seed: int, ties: bool) -> None:
    """Counts of units give the same as writing the drawn predictions out."""
    rng = np.random.default_rng(seed)
    n = units * each
    confidence = rng.integers(0, 5, n) / 4 if ties else rng.random(n)
    right = (rng.random(n) < 0.5).astype(float)
    of = made(list(confidence), list(right), list(np.repeat(np.arange(units), each)))
    counts = rng.multinomial(units, np.full(units, 1 / units), size=3).astype(float)
    for drawn, value in zip(counts, ece_of(of)(counts), strict=True):
        again = np.repeat(np.arange(n), drawn[of.units].astype(int))
        assert value == pytest.approx(ece(made(list(confidence[again]), list(right[again]))), abs=1e-9)


def test_cells_of_many_predictions_lose_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    units, each = 8, 2 * CELLS
    confidence = rng.random(units * each)
    right = (rng.random(units * each) < confidence**1.3).astype(float)
    of = made(list(confidence), list(right), list(np.repeat(np.arange(units), each)))
    assert ece_of(of)(np.ones((1, units)))[0] == pytest.approx(ece(of), abs=1e-4)
    assert ece(of) > 0.05


def test_a_calibrated_model_has_little_error_and_one_too_sure_its_excess() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(0.2, 0.8, 40_000)
    right = (rng.random(40_000) < p).astype(float)
    assert ece(made(list(p), list(right))) < 0.02
    assert ece(made(list(p + 0.2), list(right))) == pytest.approx(0.2, abs=0.01)


CHOICES = st.lists(st.floats(-50, 0), min_size=2, max_size=5)


@given(st.lists(CHOICES, min_size=1, max_size=20), st.randoms())
def test_choices_are_a_softmax_in_plain_numbers(lls: list[list[float]], chance: Any) -> None:
    labels = [chance.randrange(len(row)) for row in lls]
    found = choice_predictions(lls, labels)
    for i, (row, label) in enumerate(zip(lls, labels, strict=True)):
        whole = math.fsum(math.exp(x) for x in row)
        p = [math.exp(x) / whole for x in row]
        assert found.confidence[i] == pytest.approx(max(p))
        assert found.correct[i] == (row.index(max(row)) == label)
        assert found.brier[i] == pytest.approx(math.fsum((q - (j == label)) ** 2 for j, q in enumerate(p)), abs=1e-9)
    assert ((found.brier > -1e-9) & (found.brier < 2 + 1e-9)).all()


def test_brier_is_lm_evals_own() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(2)
    lls = rng.normal(size=(30, 4)) * 3
    labels = rng.integers(0, 4, 30)
    p = np.exp(lls) / np.exp(lls).sum(1, keepdims=True)
    theirs = metrics.brier_score(list(zip(labels.tolist(), p, strict=True)))
    assert choice_predictions(lls.tolist(), labels.tolist()).brier.mean() == pytest.approx(theirs)


def test_next_tokens_are_what_the_definitions_say_in_float64() -> None:
    class Fixed(torch.nn.Module):
        """Puts out the logits it was given."""

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            generator = torch.Generator().manual_seed(int(input_ids.sum()))
            return type("Out", (), {"logits": 3 * torch.randn(*input_ids.shape, 11, generator=generator)})

    windows = torch.randint(0, 11, (3, 300), generator=torch.Generator().manual_seed(0))
    seen: Any = observe(Fixed(), windows).model  # type: ignore[arg-type]
    for i, ids in enumerate(windows):
        p = Fixed()(ids[None], False).logits[0, :-1].double().softmax(-1)
        truth = torch.nn.functional.one_hot(ids[1:], 11)
        torch.testing.assert_close(seen.brier[i].double(), ((p - truth) ** 2).sum(-1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen.confidence[i].double(), p.amax(-1), atol=1e-6, rtol=1e-5)
        assert seen.correct[i].tolist() == (p.argmax(-1) == ids[1:]).double().tolist()
    assert seen.predictions().units.tolist() == [i for i in range(3) for _ in range(299)]


def test_tasks_of_a_group_stay_kinds_of_their_own() -> None:
    one = choice_predictions([[0.0, -1.0]] * 3, [0, 1, 0])
    two = choice_predictions([[0.0, -2.0]] * 5, [0, 0, 0, 0, 1])
    both = concatenate([one, two])
    assert both.strata == (3, 5)
    assert both.units.tolist() == list(range(8))
    assert both.accuracy == pytest.approx(6 / 8)
    values = draw(brier_of(both), both.strata, resamples=50)
    assert len(set(values.tolist())) > 5
    assert compare_calibration(both, both)["ece_difference_interval"] == [0, 0]


def test_a_difference_is_told_from_the_same_documents() -> None:
    rng = np.random.default_rng(3)
    lls = rng.normal(size=(400, 4))
    labels = [int(np.argmax(row)) if rng.random() < 0.6 else 0 for row in lls]
    ours, theirs = choice_predictions((1.1 * lls).tolist(), labels), choice_predictions(lls.tolist(), labels)
    found = compare_calibration(ours, theirs)
    low, high = found["brier_difference_interval"]
    alone = found["brier_interval"][1] - found["brier_interval"][0]
    assert low <= found["brier_difference"] <= high
    assert high - low < alone / 3
    assert found["brier_difference"] == pytest.approx(ours.brier.mean() - theirs.brier.mean())
