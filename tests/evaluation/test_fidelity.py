"""Perplexity and fidelity: what transformers says of its loss, and what the definitions say in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import laconic
from artifacts import logits, original, press, rtn, tokens
from laconic.evaluation.fidelity import Quality, measure
from tiny import make_model

WINDOWS = tokens(5, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return original(make_model(tmp_path_factory.mktemp("models") / "model", dtype=torch.float32))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Another one altogether."""
    return original(make_model(tmp_path_factory.mktemp("models") / "other", dtype=torch.float32, seed=1))


def log_p(model: PreTrainedModel) -> Tensor:
    """Log-probabilities of every next token: (tokens, vocabulary) float64."""
    return logits(model, WINDOWS)[:, :-1].double().log_softmax(-1).flatten(0, 1)


def test_perplexity_is_that_of_the_loss_that_transformers_reports(model: PreTrainedModel) -> None:
    with torch.no_grad():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in WINDOWS]
    quality = measure(model, WINDOWS)
    assert quality.tokens == 5 * 23
    assert quality.nll == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)
    assert quality.nll_stderr == pytest.approx(float(torch.tensor(losses).std()) / 5**0.5, rel=1e-3)
    assert quality.kl_mean is quality.baseline_nll is quality.baseline_perplexity is None


def test_a_model_is_wholly_faithful_to_itself(model: PreTrainedModel) -> None:
    quality = measure(model, WINDOWS, model)
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0, 0, 1)
    assert quality.baseline_nll == quality.nll


def test_fidelity_is_what_its_definition_says(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = log_p(model), log_p(other)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    quality = measure(model, WINDOWS, other)
    assert quality.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert quality.kl_p99 == pytest.approx(float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-4)
    assert quality.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert quality.baseline_nll == pytest.approx(measure(other, WINDOWS).nll)


def test_fewer_bits_are_less_faithful(llama: Path, tmp_path: Path) -> None:
    qualities = [
        measure(laconic.load(press(llama, tmp_path / s, rtn(s, group_size=32)).path), WINDOWS, original(llama))
        for s in ("W8A16", "W4A16", "W3A16", "W2A16")
    ]
    kls = [q.kl_mean for q in qualities]
    assert kls == sorted(kls)
    assert 0 < kls[0] < 0.01 < kls[-1]


def test_one_window_has_no_standard_error(model: PreTrainedModel) -> None:
    assert measure(model, WINDOWS[:1]).nll_stderr is None


def test_a_model_that_puts_out_nan_is_refused(llama: Path) -> None:
    broken = original(llama)
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="returns NaN or infinity in torch"):
        measure(broken, WINDOWS)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert Quality(tokens=1, nll=1e4, nll_stderr=0.0).perplexity == math.inf
    assert Quality(tokens=1, nll=1.0, nll_stderr=0.0, baseline_nll=1e4).baseline_perplexity == math.inf
