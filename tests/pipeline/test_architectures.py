"""Every architecture from recipe to logits: compressed, read back, and equal to the model with its decoded weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import laconic
from artifacts import (
    gptq,
    logits,
    matrices,
    matrix_of,
    original,
    press,
    quantized_linears,
    rtn,
    tensors,
    with_decoded_weights,
)
from laconic import Artifact
from tiny import ARCHITECTURES, make_model


def opens(model: Path) -> bool:
    """Whether transformers opens it quantized; it has no quantized Conv1D."""
    return json.loads((model / "config.json").read_text())["model_type"] != "gpt2"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# A tied head is of the few kinds that embeddings are.
MODELS = [(arch, False) for arch in ARCHITECTURES] + [(a, True) for a in ("llama", "gemma3", "opt", "gpt2", "mixtral")]


@pytest.fixture(scope="module", params=MODELS, ids=[f"{'tied' if tied else 'untied'}-{arch}" for arch, tied in MODELS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, tied = request.param
    return make_model(tmp_path_factory.mktemp("models") / arch, arch, tied=tied)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def artifact(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("artifacts") / "artifact"
    return press(model, folder, gptq("W4A16", group_size=32), text=text, samples=16)


def test_gptq_makes_an_artifact_that_says_what_its_weights_say(model: Path, artifact: Artifact) -> None:
    ours = laconic.load(artifact.path)
    assert quantized_linears(ours).keys() == matrices(original(model))
    expected = logits(with_decoded_weights(model, artifact.path))
    assert torch.equal(logits(ours), expected)
    if opens(model):
        assert torch.equal(logits(original(artifact.path)), expected)


def test_what_is_not_a_linear_in_a_block_is_copied(model: Path, artifact: Artifact) -> None:
    before, after = tensors(model), tensors(artifact.path)
    packed = {n.removesuffix("_packed") for n in after if n.endswith(".weight_packed")}
    assert len(packed) == len(matrices(original(model)))
    assert before.keys() - packed == {n for n in after if ".weight_" not in n}
    assert all(same(after[n], before[n]) for n in before.keys() - packed)


def test_rounding_to_eight_bits_changes_little(untied: Path, tmp_path: Path) -> None:
    artifact = press(untied, tmp_path / "artifact", rtn("W8A16"))
    ours, theirs = logits(laconic.load(artifact.path)), logits(original(untied))
    assert not torch.equal(ours, theirs)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.15


def test_rounding_activations_too_is_what_the_codes_say(untied: Path, tmp_path: Path) -> None:
    artifact = press(untied, tmp_path / "artifact", rtn("W8A8"))
    ours, dense = laconic.load(artifact.path), with_decoded_weights(untied, artifact.path)
    assert quantized_linears(ours).keys() == matrices(dense)
    for name, linear in quantized_linears(ours).items():
        weight = matrix_of(dense, name).float()
        acts = linear.scheme.input_activations
        assert acts is not None
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        # A symmetric code a token, from -127 to 127.
        scale = x.abs().amax(1, keepdim=True) / 127
        bias = 0 if linear.bias is None else linear.bias.float()
        torch.testing.assert_close(linear(x), (x / scale).round() * scale @ weight.T + bias, rtol=0.02, atol=0.02)


def test_what_a_stage_does_not_mean_is_written_as_it_was(model: Path, tmp_path: Path) -> None:
    first = min(n for n in matrices(original(model)) if ".experts." not in n)
    artifact = press(model, tmp_path / "artifact", rtn("W8A16", targets=f"re:{re.escape(first.rpartition('.')[0])}"))
    before, after = tensors(model), tensors(artifact.path)
    packed = {n.removesuffix("_packed") for n in after if n.endswith(".weight_packed")}
    assert 0 < len(packed) < len(matrices(original(model)))
    assert all(same(after[n], before[n]) for n in before.keys() - packed)
    # Some processors sum a Conv1D in another order than a linear, which float32 tells from a wrong weight.
    conv = any(isinstance(module, Conv1D) for module in original(model).modules())
    dtype, near = (torch.float32, 1e-5) if conv else (None, 0.0)
    ours, theirs = laconic.load(artifact.path, dtype=dtype), with_decoded_weights(model, artifact.path, dtype)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=near, atol=near)


# What a method shows of a head hangs on the architecture, what a scheme makes of it does not.
HEADS = [(arch, gptq("W4A16", group_size=32)) for arch in ARCHITECTURES]
HEADS += [("llama", rtn("W8A16")), ("gemma2", rtn("FP8")), ("opt", rtn("W6A6")), ("gpt2", rtn("FP8"))]


@pytest.mark.parametrize(("arch", "stage"), HEADS, ids=[f"{arch}-{stage['scheme']}" for arch, stage in HEADS])
def test_an_untied_head_can_be_quantized(arch: str, stage: dict, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    everything = stage | {"targets": ["Linear", "lm_head"], "ignore": []}
    artifact = press(folder, tmp_path / "artifact", everything, text=text, samples=16)
    ours = laconic.load(artifact.path)
    assert "lm_head" in quantized_linears(ours)
    assert "lm_head" not in artifact.config["quantization_config"]["ignore"]
    if "A16" in stage["scheme"]:
        expected = logits(with_decoded_weights(folder, artifact.path))
        assert torch.equal(logits(ours), expected)
        if opens(folder):
            torch.testing.assert_close(logits(original(artifact.path)), expected, rtol=0.02, atol=0.05)
    else:
        assert float((logits(ours) - logits(original(folder))).norm() / logits(ours).norm()) < 0.5


def test_a_tied_head_is_not_to_be_quantized(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tied=True)
    with pytest.raises(ValueError, match="lm_head, which shares its weight with the embeddings"):
        press(folder, tmp_path / "artifact", rtn("W8A16", targets=["lm_head"], ignore=[]))


def test_a_head_alone_can_be_quantized(text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    artifact = press(
        folder, tmp_path / "artifact", gptq("W4A16", group_size=32, targets="lm_head", ignore=[]), text=text
    )
    assert list(quantized_linears(laconic.load(artifact.path))) == ["lm_head"]
    assert torch.equal(logits(laconic.load(artifact.path)), logits(with_decoded_weights(folder, artifact.path)))
