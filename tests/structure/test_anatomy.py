"""Anatomy: blocks, taps and calls found by structure are those that a person would name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaModel, PreTrainedModel

from artifacts import original, tokens
from laconic.checkpoint.source import build_skeleton
from laconic.structure.anatomy import compute_head_input, dissect
from laconic.structure.calls import capture_calls
from tiny import ARCHITECTURES, make_model

ATTENTION = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
MLP = [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
FUSED = [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]
DENSE = [("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)]
FALCON = "self_attention.query_key_value"


def experts(gate: str, up: str, down: str) -> list[tuple[str, ...]]:
    """All gates and ups come before the downs."""
    each = [f"mlp.experts.{i}" for i in range(4)]
    return [*((f"{e}.{gate}", f"{e}.{up}") for e in each), *((f"{e}.{down}",) for e in each)]


TAPS: dict[str, list[tuple[str, ...]]] = {
    "phi3": FUSED,
    "opt": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "gpt_neox": [("attention.query_key_value",), ("attention.dense",), *DENSE],
    # One norm for both branches, or one each.
    "falcon": [(FALCON, "mlp.dense_h_to_4h"), ("self_attention.dense",), ("mlp.dense_4h_to_h",)],
    "falcon_40b": [(FALCON,), ("self_attention.dense",), *DENSE],
    "mixtral": ATTENTION + experts("w1", "w3", "w2"),
    "qwen3_moe": ATTENTION + experts("gate_proj", "up_proj", "down_proj"),
}
BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"} | dict.fromkeys(
    ("falcon", "falcon_40b"), "transformer.h"
)

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def bare(folder: Path) -> PreTrainedModel:
    """The model without its weights."""
    return build_skeleton(AutoConfig.from_pretrained(folder), torch.bfloat16)


@every_architecture
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_taps_are_what_a_person_would_say(arch: str, tied: bool, tmp_path: Path) -> None:
    anatomy = dissect(bare(make_model(tmp_path, arch, tied=tied)))
    assert (anatomy.blocks, anatomy.head, anatomy.tied) == (
        BLOCKS.get(arch, "model.layers"),
        "lm_head",
        tied,
    )
    for taps in anatomy.taps:
        assert [tuple(sorted(tap.linears)) for tap in taps] == [
            tuple(sorted(t)) for t in TAPS.get(arch, ATTENTION + MLP)
        ]


@every_architecture
def test_blocks_called_one_by_one_make_the_model(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, arch, dtype=torch.float32)
    model, anatomy, ids = original(folder), dissect(bare(folder)), tokens(3, 40)
    hidden, _ = capture_calls(model, anatomy.blocks, input_ids=ids)
    _, calls = capture_calls(model, anatomy.blocks, input_ids=ids[:1])
    with torch.no_grad():
        for block, call in zip(model.get_submodule(anatomy.blocks), calls, strict=True):
            hidden = call(block, hidden)
        expected = model.base_model(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(compute_head_input(model, anatomy, hidden), expected)


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3"])
def test_a_block_with_a_window_is_called_with_its_own_mask(arch: str, tmp_path: Path) -> None:
    model = original(make_model(tmp_path, arch))
    _, calls = capture_calls(model, "model.layers", input_ids=tokens(1, 40))
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * len(calls)
    for call, kind in zip(calls, kinds, strict=True):
        mask = call.kwargs["attention_mask"][0, 0, -1]
        seen_by_the_last_token = mask if mask.dtype == torch.bool else mask == 0
        assert int(seen_by_the_last_token.sum()) == (16 if kind == "sliding_attention" else 40)


def test_dissecting_leaves_the_model_as_it_was(llama: Path) -> None:
    model = bare(llama)
    before = {n: (p.shape, p.device) for n, p in model.named_parameters()}
    dissect(model)
    assert {n: (p.shape, p.device) for n, p in model.named_parameters()} == before
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_a_head_is_refused(llama: Path) -> None:
    with torch.device("meta"):
        model = LlamaModel(AutoConfig.from_pretrained(llama))
    with pytest.raises(ValueError, match="unsupported architecture 'LlamaModel': it has no output head"):
        dissect(model)


def test_a_model_without_blocks_is_refused(llama: Path) -> None:
    model = bare(llama)
    model.model.layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(ValueError, match="found no list of decoder blocks with linears"):
        dissect(model)
