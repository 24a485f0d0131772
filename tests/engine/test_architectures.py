"""Every architecture from recipe to logits: compressed, read back, and equal to the model with its decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import laconic
from artifacts import gptq, logits, original, press, quantized_linears, rtn, tensors, with_decoded_weights
from tiny import ARCHITECTURES, make_model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / arch, arch, tied=request.param)


def test_gptq_makes_an_artifact_that_says_what_its_weights_say(model: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(model, tmp_path / "artifact", gptq("W4A16", group_size=32), text=text)
    linears = quantized_linears(laconic.load(artifact.path))
    assert linears.keys() == {n for n, m in original(model).named_modules() if "layers" in n and n.endswith("_proj")}
    expected = logits(with_decoded_weights(model, artifact.path))
    assert torch.equal(logits(laconic.load(artifact.path)), expected)
    assert torch.equal(logits(original(artifact.path)), expected)


def test_rounding_to_eight_bits_changes_little(model: Path, tmp_path: Path) -> None:
    artifact = press(model, tmp_path / "artifact", rtn("W8A8"))
    ours, theirs = logits(laconic.load(artifact.path)), logits(original(model))
    assert not torch.equal(ours, theirs)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.15


def test_what_is_not_a_linear_in_a_block_is_copied(model: Path, tmp_path: Path) -> None:
    artifact = press(model, tmp_path / "artifact", rtn("W4A16", group_size=32))
    before, after = tensors(model), tensors(artifact.path)
    kept = [n for n in before if not n.endswith("_proj.weight")]
    assert kept
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in kept)
    assert all(n in before for n in after if "_proj." not in n)


@pytest.mark.parametrize("stage", [rtn("W8A16"), gptq("W4A16", group_size=32), rtn("FP8"), rtn("W6A6")], ids=str)
def test_an_untied_head_can_be_quantized(arch: str, stage: dict, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    everything = stage | {"targets": ["Linear", "lm_head"], "ignore": []}
    artifact = press(folder, tmp_path / "artifact", everything, text=text)
    ours = laconic.load(artifact.path)
    assert "lm_head" in quantized_linears(ours)
    assert "lm_head" not in artifact.config["quantization_config"]["ignore"]
    if "A16" in stage["scheme"]:
        expected = logits(with_decoded_weights(folder, artifact.path))
        assert torch.equal(logits(ours), expected)
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
