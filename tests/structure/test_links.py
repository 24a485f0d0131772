"""Links: found by what a block computes, and folding a scale through one changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import laconic
from artifacts import tokens
from laconic.structure.anatomy import Anatomy, Tap, dissect
from laconic.structure.links import Link, find_links, fold, linked_channels, pool_to_source
from tiny import ARCHITECTURES, make_model

FUSED = {"phi3"}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# Whose value heads lie where among fused q, k and v, with 4 query heads of 16.
FUSED_VALUES = {
    "gpt2": [128 + 16 * h for h in range(4)],
    "gpt_neox": [48 * h + 32 for h in range(4)],
    "falcon": [80] * 4,
}


def anatomy_and_links(folder: Path) -> tuple[nn.Module, Anatomy, dict[Tap, Link]]:
    model = laconic.load(folder)
    anatomy = dissect(model)
    return model, anatomy, dict(find_links(model, anatomy)[0])


@pytest.mark.parametrize("arch", GATED)
def test_every_linear_of_a_gated_block_has_a_link(arch: str, tmp_path: Path) -> None:
    _, anatomy, links = anatomy_and_links(make_model(tmp_path / "model", arch))
    attention, out, up, down = anatomy.taps[0]
    assert set(links) == {attention, out, up, down}
    assert links[attention].is_norm
    assert links[up].is_norm
    assert links[attention].offset == arch.startswith("gemma")
    assert links[out].source.endswith("qkv_proj" if arch in FUSED else "v_proj")
    assert links[down].source.endswith("gate_up_proj" if arch in FUSED else "up_proj")


@pytest.mark.parametrize("arch", FUSED_VALUES)
def test_values_are_found_in_fused_attention_and_gelu_is_no_link(arch: str, tmp_path: Path) -> None:
    _, anatomy, links = anatomy_and_links(make_model(tmp_path / "model", arch))
    out = next(tap for tap, link in links.items() if not link.is_norm)
    assert links[out].channels[::16].tolist() == FUSED_VALUES[arch]
    assert [tap for tap in anatomy.taps[0] if tap not in links] == [anatomy.taps[0][-1]]


def test_relu_between_two_linears_is_a_link(tmp_path: Path) -> None:
    _, anatomy, links = anatomy_and_links(make_model(tmp_path / "model", "opt"))
    assert links[anatomy.taps[0][-1]].source == "fc1"


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_all_experts_and_their_router_are_behind_one_norm(arch: str, tmp_path: Path) -> None:
    model, anatomy, links = anatomy_and_links(make_model(tmp_path / "model", arch))
    experts = [tap for tap in anatomy.taps[0] if tap.experts]
    before = {links[tap] for tap in experts if links[tap].is_norm}
    (link,) = before
    assert len(links) == len(anatomy.taps[0])
    block = model.get_submodule(anatomy.block_name(0))
    assert {n for tap in experts if links[tap].is_norm for n in tap.linears} < set(link.readers)
    assert any(len(block.get_submodule(n).weight) == 4 for n in link.readers), "the router reads it too"


def test_grouped_values_reach_every_query_head_of_their_group(tmp_path: Path) -> None:
    # Four query heads of 16, two of key and value: heads 0 and 1 read the first, 2 and 3 the second.
    _, anatomy, links = anatomy_and_links(make_model(tmp_path / "model"))
    channels = links[anatomy.taps[0][1]].channels
    heads = [0, 0, 1, 1]
    assert channels.tolist() == [h * 16 + i for h in heads for i in range(16)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folding_keeps_the_function(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch, dtype=torch.float32)
    model, anatomy, links = anatomy_and_links(folder)
    ids = tokens(2, 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = model(ids).logits
        for i in range(len(anatomy.taps)):
            block = model.get_submodule(anatomy.block_name(i))
            for link in dict.fromkeys(links.values()):
                width = block.get_submodule(link.source).weight.shape[0]
                count = width if link.is_norm else len(linked_channels(link))
                before = {n: block.get_submodule(n).weight.clone() for n in link.readers}
                columns = fold(block, link, torch.rand(count, generator=generator) * 4 + 0.1)
                for name, weight in before.items():
                    torch.testing.assert_close(block.get_submodule(name).weight, weight * columns)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_norm_that_feeds_the_residual_is_no_link(tmp_path: Path) -> None:
    model, anatomy, _ = anatomy_and_links(make_model(tmp_path / "model"))
    for block in model.model.layers:
        # What the norm puts out goes into the residual as well, so that scaling it would show.
        block.register_forward_pre_hook(lambda m, args: (m.input_layernorm(args[0]), *args[1:]))
    links = find_links(model, anatomy)[0]
    assert all(link.source != "input_layernorm" for link in links.values())


def test_an_unlike_nonlinearity_between_two_linears_is_no_link(tmp_path: Path) -> None:
    model, anatomy, _ = anatomy_and_links(make_model(tmp_path / "model"))
    for block in model.model.layers:
        block.mlp.up_proj.register_forward_hook(lambda m, args, y: torch.tanh(y))
    assert anatomy.taps[0][3] not in find_links(model, anatomy)[0]


def test_pooling_takes_the_largest_of_what_a_channel_feeds() -> None:
    link = Link(("o",), "v", torch.tensor([4, 4, 7, 5]))
    assert linked_channels(link).tolist() == [4, 5, 7]
    assert pool_to_source(link, torch.tensor([1.0, 3.0, 2.0, 9.0])).tolist() == [3.0, 9.0, 2.0]
