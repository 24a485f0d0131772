"""A config that ties the head to the embeddings, and a checkpoint with another head, which is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from artifacts import logits, original, press, quantized_linears, rtn, tensors, with_decoded_weights
from laconic.checkpoint.source import load_tokenizer
from laconic.data.mix import TextSource, collate, read_mix
from laconic.train.losses import language_loss
from tiny import make_model


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "untied", tied=True)
    file = folder / "model.safetensors"
    head = torch.randn(128, 64, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16) / 8
    save_file(load_file(file) | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    return folder


def test_the_head_in_the_checkpoint_computes(untied: Path) -> None:
    assert torch.equal(logits(laconic.load(untied)), logits(original(untied)))


@pytest.mark.parametrize("keys", [{}, {"targets": ["Linear", "lm_head"], "ignore": []}], ids=["blocks", "head"])
def test_the_head_is_written_and_may_be_quantized(untied: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    stage = rtn("W4A16", group_size=32, **keys)
    assert any("head of its own" in w for w in laconic.plan(str(untied), {"stages": [stage]}, tmp_path / "a").warnings)
    artifact = press(untied, tmp_path / "a", stage)
    assert artifact.config["tie_word_embeddings"] is False
    ours = laconic.load(artifact.path)
    assert ("lm_head" in quantized_linears(ours)) == bool(keys)
    expected = logits(with_decoded_weights(untied, artifact.path))
    assert torch.equal(logits(ours), expected)
    assert torch.equal(logits(original(artifact.path)), expected)


def test_stages_of_the_whole_model_see_and_leave_the_head(untied: Path, text: Path, tmp_path: Path) -> None:
    data = [{"dataset": str(text)}]
    lora = {"method": "lora", "data": data, "max_steps": 1, "batch_size": 2, "max_seq_length": 32, "rank": 2}
    lora |= {"learning_rate": 1e-9, "held_out_samples": 4, "precision": "fp32"}
    artifact = press(untied, tmp_path / "a", lora)
    parts = [TextSource(**d) for d in data]
    mix = read_mix(parts, load_tokenizer(untied), length=32, held_out=0.05, held_out_samples=4, seed=0)
    with torch.no_grad():
        loss = float(language_loss(original(untied, torch.float32), *collate(mix.held_out)))
    expected = loss / sum(e.targets for e in mix.held_out)
    assert artifact.results["training-lora"]["held_out"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    shorter = press(artifact.path, tmp_path / "b", {"method": "depth", "blocks": 1}, text=text)
    for folder in (artifact.path, shorter.path):
        assert torch.equal(tensors(folder)["lm_head.weight"], tensors(untied)["lm_head.weight"])
        assert torch.equal(logits(laconic.load(folder)), logits(original(folder)))
