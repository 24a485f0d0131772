"""The files of a model beside its weights, which the artifact has too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import laconic
from artifacts import logits, original, press, rtn

FILES = (
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "modeling_custom.py",
    "LICENSE",
)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def test_files_of_tokenizer_templates_and_code_are_in_the_artifact(model: Path, text: Path, tmp_path: Path) -> None:
    for name in FILES:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"contents of {name}")
    stages = [{"method": "depth", "blocks": 1}, rtn("W8A16")]
    artifact = press(model, tmp_path / "artifact", *stages, text=text)
    assert [(artifact.path / name).read_text() for name in FILES] == [f"contents of {name}" for name in FILES]
    templates = AutoTokenizer.from_pretrained(artifact.path).chat_template
    assert templates["tool_use"] == "contents of additional_chat_templates/tool_use.jinja"


def test_the_config_of_an_adapter_without_weights_is_left_out(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    artifact = press(model, tmp_path / "artifact", rtn("W8A16"))
    assert not (artifact.path / "adapter_config.json").exists()


def test_an_adapter_beside_the_weights_is_loaded_as_transformers_does(model: Path) -> None:
    pytest.importorskip("peft")
    keys = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model)}
    config = keys | {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    linears = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    shapes = {f"{n}.lora_A.weight": (2, 64) for n in linears} | {f"{n}.lora_B.weight": (64, 2) for n in linears}
    noise = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    before = logits(laconic.load(model, dtype=torch.float32))
    save_file(noise, model / "adapter_model.safetensors", metadata={"format": "pt"})
    expected = logits(original(model, torch.float32))
    assert not torch.allclose(before, expected, atol=0.1)
    assert torch.allclose(logits(laconic.load(model, dtype=torch.float32)), expected, atol=1e-5)


def test_an_adapter_that_is_a_pickle_is_refused_rather_than_left_out(model: Path) -> None:
    (model / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.bin is an adapter as a pickle.*save it again with peft"):
        laconic.load(model)


def test_an_adapter_that_transformers_would_apply_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 64)}, model / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"transformers applies to its weights; move .* with peft .*merge_and_unload"):
        press(model, tmp_path / "artifact", rtn("W8A16"))
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="an adapter of 'org/base' and no model; merge them with peft"):
        press(model, tmp_path / "artifact", rtn("W8A16"))
    assert not (tmp_path / "artifact").exists()
