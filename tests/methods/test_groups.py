"""Dependency groups: a model without some units computes what the whole one does with these units at zero."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from artifacts import logits, original
from laconic.checkpoint.rebuild import rebuild_model, tensors_of
from laconic.checkpoint.source import build_skeleton, open_source
from laconic.methods.llm_pruner.groups import Group, find_groups, match_channels, remove_units
from laconic.runtime.reading import load
from laconic.structure.anatomy import Anatomy, dissect
from laconic.structure.widths import add_widths
from tiny import ARCHITECTURES, SHARED, make_model

# Models whose config can say how many heads there are, whatever their width; how many units attention has elsewhere.
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
UNITS = {"falcon_40b": 2, "mixtral": 2, "qwen3_moe": 2, "qwen2_moe": 2, "glm4_moe": 2}
# Widths of MLPs and experts in the last block, where they are not one of 128; and how many parts these have.
WIDTHS = {
    "mixtral": [(128, 4)],
    "qwen3_moe": [(64, 4)],
    "qwen2_moe": [(96, 1), (64, 4)],
    "glm4_moe": [(64, 5)],
}


@pytest.fixture(scope="module", params=(*ARCHITECTURES, *SHARED))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("groups") / request.param
    make_model(
        folder, request.param, dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4, head_dim=8
    ) if (request.param in HEADS) else make_model(folder, request.param, dtype=torch.float32)
    return request.param, folder


@cache
def opened(folder: Path) -> tuple[Any, Anatomy]:
    """A model in float64, not to be changed."""
    dense = load(folder, dtype=torch.float64)
    return dense, dissect(dense)


@cache
def groups_of(folder: Path) -> tuple[tuple[Group, ...], ...]:
    source = open_source(str(folder))
    whole = build_skeleton(source.config, source.dtype)
    return find_groups(whole, dissect(whole))


def test_groups_are_what_the_architecture_has(model: tuple[str, Path]) -> None:
    arch, folder = model
    attention, *mlps = groups_of(folder)[-1]
    assert (attention.kind, attention.units) == ("attention", UNITS.get(arch, 4))
    assert attention.fits_stock_config == (arch not in ("opt", "gpt2", "gpt_neox", "falcon", "falcon_40b"))
    assert {g.kind for g in mlps} == {"mlp"}
    assert [(g.units, len(g.by_module)) for g in mlps] == WIDTHS.get(arch, [(128, 1)])


def test_an_unmixed_llama_has_the_linears_that_everybody_knows(llama: Path) -> None:
    for attention, mlp in groups_of(llama):
        told = [(s.linear, s.axis, tuple(s.channels.shape)) for s in attention.slices]
        assert told == [
            ("self_attn.q_proj", 0, (2, 32)),
            ("self_attn.k_proj", 0, (2, 16)),
            ("self_attn.v_proj", 0, (2, 16)),
            ("self_attn.o_proj", 1, (2, 32)),
        ]
        assert dict(attention.keys) == {"num_attention_heads": 2, "num_key_value_heads": 1}
        assert [s.linear for s in mlp.slices] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        assert dict(mlp.keys) == {"intermediate_size": 1}


# Without shrinking, which takes minutes here.
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_without_units_it_computes_what_it_does_with_them_at_zero(model: tuple[str, Path], data: st.DataObject) -> None:
    _, folder = model
    raw = json.loads((folder / "config.json").read_text())
    dense, anatomy = opened(folder)
    tensors, widths = tensors_of(dense), list[dict[str, int]]()
    zeroed: Any = deepcopy(dense)
    for i, groups in enumerate(groups_of(folder)):
        widths.append({})
        for group in groups:
            kept = torch.zeros(group.units, dtype=torch.bool)
            if len(group.by_module) > 1:
                # Which channels of one expert go with which of another is free.
                channels = {n: own[0].channels.numel() for n, own in group.by_module.items()}
                group = match_channels(group, {n: torch.rand(count) for n, count in channels.items()})
            kept[data.draw(st.lists(st.integers(0, group.units - 1), min_size=1, unique=True))] = True
            prefix = f"{anatomy.block_name(i)}."
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            tensors |= {prefix + n: t for n, t in remove_units(inside, group, kept).items()}
            widths[-1] |= group.widths(int(kept.sum()))
            for part in group.slices:
                linear = zeroed.get_submodule(prefix + part.linear)
                gone = part.channels[~kept].flatten()
                (linear.weight.data if part.axis == 0 else linear.weight.data.T)[gone] = 0
                if part.axis == 0 and linear.bias is not None:
                    linear.bias.data[gone] = 0
    narrower = rebuild_model(add_widths(raw, widths), tensors, torch.float64)
    expected = logits(zeroed)
    # Norms and softmaxes compute in float32 whatever the model's dtype.
    assert (logits(narrower) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_model_that_units_are_taken_from_is_the_plain_one(model: tuple[str, Path]) -> None:
    _, folder = model
    assert torch.allclose(logits(load(folder)), logits(original(folder)), atol=1e-4)


def test_queries_of_one_key_value_head_are_units_of_their_own(tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_key_value_heads=1)
    for attention, _ in groups_of(tmp_path / "model"):
        assert [(s.linear, tuple(s.channels.shape)) for s in attention.slices] == [
            ("self_attn.q_proj", (4, 16)),
            ("self_attn.o_proj", (4, 16)),
        ]
        assert attention.widths(3) == {"num_attention_heads": 3}


def test_a_head_whose_place_matters_is_no_group(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "falcon", alibi=True, multi_query=False)
    assert [[g.kind for g in groups] for groups in groups_of(tmp_path / "model")] == [["mlp"], ["mlp"]]


def test_the_best_channels_of_every_part_are_matched(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "glm4_moe")
    _, experts = groups_of(tmp_path / "model")[-1]
    worth = {n: torch.rand(own[0].channels.numel()) for n, own in experts.by_module.items()}
    found = match_channels(experts, worth)
    assert {n: own[0].channels.shape[1] for n, own in found.by_module.items()} == {
        **{f"mlp.experts.{i}": 1 for i in range(4)},
        "mlp.shared_experts": 2,
    }
    for name, own in found.by_module.items():
        assert all(torch.equal(s.channels, own[0].channels) for s in own)
        assert torch.equal(worth[name][own[0].channels].flatten(), worth[name].sort(descending=True).values)
