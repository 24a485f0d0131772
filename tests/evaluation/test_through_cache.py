"""A text through a cache in chunks: what the plain forward pass says, and what it shows of damage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Cache, PreTrainedModel

from artifacts import logits, original, tokens
from laconic.evaluation.context_perplexity import edges, perplexity_by_position
from laconic.evaluation.fidelity import measure
from laconic.evaluation.through_cache import PLAIN, continue_greedily, plain_cache
from laconic.kv.attach import make_cache
from laconic.kv.format import KvFormat
from laconic.kv.scheme import uniform
from tiny import make_model

WINDOWS = tokens(3, 80)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return original(make_model(tmp_path_factory.mktemp("models") / "model", dtype=torch.float32), torch.float32)


def caches(model: PreTrainedModel, *bits: int) -> dict[str, Callable[[], Cache]]:
    """16 bit, and keys and values of so many bits each."""
    made: dict[str, Callable[[], Cache]] = {PLAIN: partial(plain_cache, model)}
    for b in bits:
        scheme = uniform("test", KvFormat(b, "channel", 8), KvFormat(b, "token", 16), 2)
        made[str(b)] = partial(make_cache, model, scheme)
    return made


@pytest.mark.parametrize("chunk", [1, 7, 32, 80])
def test_16_bit_is_the_plain_forward_pass_whatever_the_chunk(model: PreTrainedModel, chunk: int) -> None:
    found = perplexity_by_position(model, WINDOWS, caches(model), chunk=chunk)[PLAIN][-1]
    expected = measure(model, WINDOWS)
    assert (found.tokens, found.start, found.stop) == (expected.tokens, 0, 80)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.nll_stderr == pytest.approx(expected.nll_stderr, rel=1e-4)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt2", "falcon"])
def test_other_architectures_too(kind: str, tmp_path: Path) -> None:
    other = original(make_model(tmp_path / kind, kind, dtype=torch.float32), torch.float32)
    found = perplexity_by_position(other, WINDOWS, caches(other, 16), chunk=7)
    assert [row[-1].nll for row in found.values()] == pytest.approx([measure(other, WINDOWS).nll] * 2, rel=1e-5)


def test_each_token_is_in_the_bucket_of_its_position(model: PreTrainedModel) -> None:
    logp = logits(model, WINDOWS)[:, :-1].double().log_softmax(-1)
    nll = -logp.gather(-1, WINDOWS[:, 1:, None])[..., 0]
    found = perplexity_by_position(model, WINDOWS, caches(model), chunk=16, ends=[20, 50, 80])[PLAIN]
    assert [(b.start, b.stop, b.tokens) for b in found] == [(0, 20, 57), (20, 50, 90), (50, 80, 90), (0, 80, 237)]
    # The token at position p is told by the one before it.
    expected = [nll[:, :19], nll[:, 19:49], nll[:, 49:], nll]
    assert [b.nll for b in found] == pytest.approx([float(e.mean()) for e in expected], rel=1e-6)


def test_buckets_double() -> None:
    assert edges(300) == [300]
    assert edges(512) == [512]
    assert edges(3000) == [512, 1024, 2048, 3000]


def test_fewer_bits_are_less_faithful_and_the_first_chunk_is_exact(model: PreTrainedModel) -> None:
    found = perplexity_by_position(model, WINDOWS, caches(model, 8, 4, 2), chunk=16, ends=[17, 80])
    assert [row[0].kl_mean for row in found.values()] == [0] * 4
    kls = [row[1].kl_mean for row in found.values()]
    assert kls == sorted(kls)
    assert 0 == kls[0] < kls[1] < kls[3]


def test_what_is_continued_is_what_generate_says(model: PreTrainedModel) -> None:
    ids = WINDOWS[:, :30]
    expected = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=1)[:, 30:]
    assert torch.equal(continue_greedily(model, ids, plain_cache(model), chunk=8, tokens=9), expected)


def test_a_model_that_puts_out_nan_is_refused(llama: Path) -> None:
    broken = original(llama)
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="returns NaN or infinity in torch"):
        perplexity_by_position(broken, WINDOWS, caches(broken))
