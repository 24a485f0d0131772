"""An evaluation of a study through an artifact's own cache, against transformers' cache rounded by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from artifacts import logits, original, press, rtn
from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import load_tokenizer
from laconic.data.text import evaluation_windows
from laconic.evaluation import context_perplexity
from laconic.sweep.measure import measure
from laconic.sweep.study import Evaluation

STAGE = {"method": "kv_per_token", "k_bits": 3, "v_bits": 2}
LENGTH, WINDOWS = 48, 5


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The weights of the original, and a cache on a range of each token and head."""
    return press(llama, tmp_path_factory.mktemp("artifacts") / "kv", STAGE)


@pytest.fixture(scope="module")
def model(llama: Path) -> PreTrainedModel:
    return original(llama, torch.float32)


@pytest.fixture(scope="module")
def ids(llama: Path, text: Path) -> Tensor:
    """The windows of the text."""
    return evaluation_windows([text.read_text()], load_tokenizer(llama), length=LENGTH, limit=None)


def asked(text: Path, **keys: Any) -> Evaluation:
    keys = {"context_length": LENGTH, "windows": WINDOWS, "chunk": 8, "dtype": "float32"} | keys
    return Evaluation(text=str(text), **keys)


@pytest.mark.parametrize("chunk", [1, 8, 20])
def test_it_is_what_rounding_between_chunks_by_hand_gives(
    artifact: Artifact, model: PreTrainedModel, ids: Tensor, text: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A window of more than 512 tokens is told in several parts, of which the whole is wanted.
    monkeypatch.setattr(context_perplexity, "edges", lambda length: [20, length])
    said = measure(artifact.path, asked(text, chunk=chunk), None)
    shown = ids[:WINDOWS]
    exact, rounded = log_softmax(logits(model, shown)), log_softmax(read_rounding(model, shown, chunk))
    seen = shown[:, 1:, None].numpy()
    plain_nll, nll = (-np.take_along_axis(p[:, :-1], seen, -1)[..., 0] for p in (exact, rounded))
    kl = (np.exp(exact) * (exact - rounded)).sum(-1)[:, :-1]
    same = (exact.argmax(-1) == rounded.argmax(-1))[:, :-1]
    assert said["tokens"] == nll.size
    assert said["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert said["nll_stderr"] == pytest.approx(nll.mean(1).std(ddof=1) / math.sqrt(WINDOWS), rel=1e-3)
    assert said["baseline_perplexity"] == pytest.approx(math.exp(plain_nll.mean()), rel=1e-5)
    assert said["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3)
    assert said["kl_p99"] == pytest.approx(np.sort(kl, axis=None)[math.ceil(0.99 * kl.size) - 1], rel=1e-3)
    assert said["top1_agreement"] == pytest.approx(same.mean())
    # Or there would be nothing that the cache did.
    assert said["kl_mean"] > 1e-4
    assert said["perplexity"] != pytest.approx(said["baseline_perplexity"], rel=1e-4)


def test_bits_are_those_of_codes_and_ranges(artifact: Artifact, text: Path) -> None:
    said = measure(artifact.path, asked(text), None)
    # Two numbers of 16 bit go with the 16 channels of a head.
    assert said["kv_bits"] == pytest.approx(((3 + 2 * 16 / 16) + (2 + 2 * 16 / 16)) / 2)
    assert (said["chunk"], said["context_length"], said["windows"], said["dtype"]) == (8, LENGTH, WINDOWS, "float32")


def test_without_a_number_of_windows_it_is_the_whole_text(artifact: Artifact, ids: Tensor, text: Path) -> None:
    said = measure(artifact.path, asked(text, windows=None, chunk=24), None)
    assert said["windows"] == len(ids) > WINDOWS
    assert said["tokens"] == len(ids) * (LENGTH - 1)


def test_an_artifact_without_a_cache_has_nothing_to_read_through(llama: Path, text: Path, tmp_path: Path) -> None:
    made = press(llama, tmp_path / "w8", rtn("W8A16"))
    with pytest.raises(ValueError, match="has no quantized cache to read through; remove 'chunk'"):
        measure(made.path, asked(text), None)


@torch.no_grad()
def read_rounding(model: PreTrainedModel, windows: Tensor, chunk: int) -> Tensor:
    """Logits of a text that is read so many tokens at a time; what the cache holds of them is rounded before the
    next."""
    read = []
    cache = DynamicCache(config=model.config)
    for piece in windows.split(chunk, dim=1):
        read.append(model(input_ids=piece, cache=cache, use_cache=True).logits)
        new = piece.shape[1]
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys[:, :, -new:] = to_nearest(layer.keys[:, :, -new:], STAGE["k_bits"])
            layer.values[:, :, -new:] = to_nearest(layer.values[:, :, -new:], STAGE["v_bits"])
    return torch.cat(read, 1)


def to_nearest(x: Tensor, bits: Any) -> Tensor:
    """On evenly spaced values between the least and the greatest channel of each token and head, both in 16 bit."""
    low = x.amin(-1, keepdim=True)
    step = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    return low + step * ((x - low) / step).round().clamp(0, 2**bits - 1)


def log_softmax(values: Tensor) -> Any:
    """In float64, by numpy."""
    x = values.detach().double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
