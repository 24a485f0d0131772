"""Tensors that belong to no part of the text model, above all heads for multi-token prediction, are never lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, Qwen3NextConfig

import laconic
from artifacts import logits, original, press, rtn, tensors, with_decoded_weights
from laconic.artifact.size import measure_size
from tiny import make_model, make_tokenizer, randomise

W8 = rtn("W8A16")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def head(name: str) -> dict[str, Tensor]:
    """A layer for multi-token prediction: a projection, a norm, attention, two experts."""
    linears = {"eh_proj": (64, 128), "self_attn.q_proj": (64, 64), "shared_head.head": (128, 64)}
    experts = {f"mlp.experts.{i}.{n}_proj": (64, 64) for i in range(2) for n in ("gate", "up", "down")}
    return {f"{name}.{n}.weight": noise(*shape) for n, shape in (linears | experts).items()} | {
        f"{name}.enorm.weight": noise(64),
        f"{name}.hnorm.weight": torch.full((64,), torch.nan, dtype=torch.float32),
    }


def build(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomise(model)
    model.save_pretrained(folder)
    return make_tokenizer(folder)


def glm4(folder: Path) -> Path:
    return make_model(folder, "glm4_moe", num_nextn_predict_layers=1)


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def deepseek(folder: Path) -> Path:
    keys = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    return build(folder, DeepseekV3Config(**SIZES, **keys, **experts, **layers, num_nextn_predict_layers=1))


def qwen3_next(folder: Path) -> Path:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 16, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64}
    types = ["linear_attention", "full_attention"]
    return build(folder, Qwen3NextConfig(**SIZES, **linear, **heads, **experts, num_hidden_layers=2, layer_types=types))


HEADS = {
    "GLM-4-MoE": (glm4, head("model.layers.46")),
    "DeepSeek-V3": (deepseek, head("model.layers.61")),
    "Qwen3-Next": (qwen3_next, head("mtp.layers.0") | {"mtp.fc.weight": noise(64, 128)}),
    "any": (
        lambda folder: make_model(folder),
        {"value_head.summary.weight": noise(1, 64), "model.layers.1.self_attn.rotary_emb.inv_freq": noise(8).float()},
    ),
}


def add(folder: Path, extra: dict[str, Tensor]) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_extra_tensors_go_into_the_artifact_unchanged(name: str, tmp_path: Path) -> None:
    make, extra = HEADS[name]
    bare, whole = make(tmp_path / "bare"), add(make(tmp_path / "whole"), extra)
    (warning,) = [w for w in laconic.plan(str(whole), {"stages": [W8]}, tmp_path / "a").warnings if "unchanged" in w]
    assert f"{len(extra)} tensors that are not part of the text model" in warning
    artifact, without = press(whole, tmp_path / "a", W8), press(bare, tmp_path / "b", W8)
    held, expected = tensors(artifact.path), tensors(without.path)
    assert held.keys() == expected.keys() | extra.keys()
    for n, tensor in extra.items():
        assert held[n].dtype == tensor.dtype
        assert torch.equal(held[n].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(without.path)))
    listed = artifact.config["quantization_config"]["ignore"]
    for n in (n.removesuffix(".weight") for n, t in extra.items() if t.dim() == 2):
        path, experts, _ = n.partition(".experts.")
        assert (f"re:{path.replace('.', chr(92) + '.')}\\.experts\\.\\d+\\..*" if experts else n) in listed
    # They are counted in the sizes of both, and so are no compression.
    sizes = [measure_size(folder) for folder in (artifact.path, without.path, whole, bare)]
    elements, nbytes = sum(t.numel() for t in extra.values()), sum(t.nbytes for t in extra.values())
    for with_extra, plain in (sizes[:2], sizes[2:]):
        assert with_extra.parameters - plain.parameters == elements
        assert with_extra.tensor_bytes - plain.tensor_bytes == nbytes


def test_transformers_opens_an_artifact_with_a_prediction_head(tmp_path: Path) -> None:
    folder = add(glm4(tmp_path / "model"), head("model.layers.46"))
    artifact = press(folder, tmp_path / "a", rtn("W4A16", group_size=32))
    assert torch.equal(logits(original(artifact.path)), logits(with_decoded_weights(folder, artifact.path)))


def test_a_prediction_head_stays_behind_the_last_block_where_blocks_are_dropped(text: Path, tmp_path: Path) -> None:
    extra = head("model.layers.3") | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": noise(8 + i) for i in range(3)}
    folder = add(make_model(tmp_path / "model", num_hidden_layers=3), extra)
    artifact = press(folder, tmp_path / "a", {"method": "depth", "blocks": 1}, text=text)
    held, kept = tensors(artifact.path), [i for i in range(3) if i not in artifact.results["pruning"]["dropped"]]
    for n, tensor in head("model.layers.2").items():
        assert torch.equal(held[n].view(torch.uint8), tensor.view(torch.uint8))
    lengths = [len(held[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"]) for i in range(2)]
    assert lengths == [8 + i for i in kept]
    assert not any(n.startswith("model.layers.3.") for n in held)
