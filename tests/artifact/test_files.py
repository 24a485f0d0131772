"""The files of a model beside its weights, which the artifact has too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from artifacts import press, rtn

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


def test_an_adapter_that_transformers_would_apply_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 64)}, model / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"transformers applies to its weights; move .* with peft .*merge_and_unload"):
        press(model, tmp_path / "artifact", rtn("W8A16"))
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="an adapter of 'org/base' and no model; merge them with peft"):
        press(model, tmp_path / "artifact", rtn("W8A16"))
    assert not (tmp_path / "artifact").exists()
