"""`laconic eval`: the measurements of an artifact beside its original, kept with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import original, press, rtn
from laconic import Artifact
from laconic.artifact.size import measure_size
from laconic.checkpoint.source import load_tokenizer
from laconic.data.text import evaluation_windows, read_documents
from laconic.evaluation.fidelity import measure
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text
from tiny import make_model


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(llama, tmp_path_factory.mktemp("artifacts") / "w4", rtn("W4A16", group_size=32))


def test_it_measures_what_its_parts_measure(artifact: Artifact, llama: Path, text: Path) -> None:
    result = evaluate_text(
        artifact.path, TextOptions(baseline=str(llama), text=str(text), context_length=32, windows=7)
    )
    ids = evaluation_windows(read_documents(str(text)), load_tokenizer(llama), length=32, limit=7)
    quality = measure(laconic.load(artifact.path), ids, original(llama))
    assert (result["windows"], result["tokens"], result["context_length"], result["stride"]) == (7, 7 * 31, 32, 32)
    assert result["dtype"] == "bfloat16"
    for name in ("perplexity", "baseline_perplexity", "kl_mean", "kl_p99", "top1_agreement", "nll_stderr"):
        assert result[name] == getattr(quality, name)
    assert result["bits_per_weight"] == measure_size(artifact.path).bits_per_weight
    assert result["baseline_bits_per_weight"] == 16
    assert artifact.results["eval-calibration-32-7"] == result


def test_it_computes_in_the_dtype_asked_for(artifact: Artifact, text: Path) -> None:
    result = evaluate_text(artifact.path, TextOptions(text=str(text), context_length=32, windows=2, dtype="float32"))
    ids = evaluation_windows(read_documents(str(text)), load_tokenizer(artifact.path), length=32, limit=2)
    assert result["dtype"] == "float32"
    assert result["perplexity"] == measure(laconic.load(artifact.path, dtype=torch.float32), ids).perplexity


def test_a_plain_model_is_measured_and_left_alone(llama: Path, text: Path) -> None:
    before = sorted(llama.iterdir())
    result = evaluate_text(llama, TextOptions(text=str(text), context_length=32, windows=2))
    assert result["perplexity"] > 1
    assert result["kl_mean"] is None
    assert sorted(llama.iterdir()) == before


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"context_length": 1}, "is not between 2 and the model's context of 256"),
        ({"context_length": 257}, "is not between 2 and the model's context of 256"),
    ],
    ids=str,
)
def test_a_context_that_the_model_has_not_is_refused(
    asked: dict[str, Any], reason: str, llama: Path, text: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate_text(llama, TextOptions(text=str(text), **asked))


def test_a_baseline_of_another_vocabulary_is_refused(artifact: Artifact, text: Path, tmp_path: Path) -> None:
    stranger = make_model(tmp_path / "stranger", vocab_size=150)
    with pytest.raises(ValueError, match="has another vocabulary"):
        evaluate_text(artifact.path, TextOptions(baseline=str(stranger), text=str(text), context_length=32))
