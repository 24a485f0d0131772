"""A rotated model computes what it did, in stock transformers; what cannot be rotated is refused in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from artifacts import logits, original, press, quantized_linears, rtn, tensors
from commands import Laconic
from laconic.formats.rotation import rotate_channels
from shrunk import make_shrunk
from tiny import ARCHITECTURES, SHARED, make_model, make_recipe

ROTATE = {"method": "rotate"}
NORMS_AFTER = ("gemma2", "gemma3")
# RMSNorms; LayerNorms with and without biases of their readers; parallel sublayers with two norms; experts.
FAST = ("llama", "gpt2", "falcon_40b", "mixtral")
SLOW = sorted({*ARCHITECTURES, *SHARED} - {*NORMS_AFTER, *FAST})


@pytest.mark.parametrize("arch", [*FAST, *(pytest.param(a, marks=pytest.mark.slow) for a in SLOW)])
def test_logits_are_those_of_the_original(arch: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", arch, dtype=torch.float32, tied=True)
    rotated = press(source, tmp_path / "out", ROTATE).path
    before, after = original(source), original(rotated)
    assert type(before) is type(after)
    assert (logits(after) - logits(before)).abs().max() < 1e-4 * logits(before).abs().max()
    # The residual stream is another: no row of the embeddings is what it was.
    assert (tensors(rotated).keys() - tensors(source).keys()) == {"lm_head.weight"} or arch == "gpt_neox"
    assert (after.get_input_embeddings().weight - before.get_input_embeddings().weight).abs().amax(1).min() > 0.1


# 72 = 9 x 8 channels, heads of 12 = 3 x 4.
ODD = {"hidden_size": 72, "num_attention_heads": 6, "head_dim": 12}


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_widths_need_not_be_powers_of_two(rotation: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", dtype=torch.float32, **ODD)
    rotated = press(source, tmp_path / "out", ROTATE | {"rotation": rotation}).path
    expected = logits(original(source))
    assert (logits(original(rotated)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all((t == 1).all() for n, t in tensors(rotated).items() if n.endswith("norm.weight"))
    values = [tensors(f)["model.layers.0.self_attn.v_proj.weight"] for f in (source, rotated)]
    unrotated = press(source, tmp_path / "stream", ROTATE | {"rotation": rotation, "heads": False}).path
    assert not torch.equal(tensors(unrotated)["model.layers.0.self_attn.v_proj.weight"], values[1])


def test_a_norm_of_one_plus_its_weight_becomes_zero(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GemmaConfig

    from tiny import _SIZES, make_tokenizer, randomise

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GemmaConfig(**_SIZES), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    source = make_tokenizer(tmp_path / "model")
    rotated = press(source, tmp_path / "out", ROTATE).path
    expected = logits(original(source))
    assert (logits(original(rotated)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not tensors(rotated)["model.norm.weight"].any()


def test_an_outlier_channel_is_spread_and_rounding_activations_costs_less(tmp_path: Path, text: Path) -> None:
    source = make_model(tmp_path / "model", dtype=torch.float32)
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 3] *= 30
    weights = {n: t * (1 / 30 if n.endswith("layernorm.weight") else 1) for n, t in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    expected = logits(original(source))
    rounded = {"method": "rtn", "scheme": "W4A4", "group_size": 32}
    errors = [
        (logits(laconic.load(press(source, tmp_path / name, *stages).path)) - expected).square().mean()
        for name, stages in {"plain": [rounded], "rotated": [ROTATE, rounded]}.items()
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_tied_head_is_given_its_own_matrix_with_a_warning_of_its_size(laconic: Laconic, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tied=True)
    recipe = make_recipe(tmp_path / "recipe.yaml", ROTATE, model=str(source), output=str(tmp_path / "out"))
    ran = laconic("compress", recipe)
    assert ran.code == 0
    assert "the model grows by 0.0 MB" in ran.out + ran.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    grown = sum(t.nbytes for t in tensors(tmp_path / "out").values()) - sum(t.nbytes for t in tensors(source).values())
    assert grown == 128 * 64 * 2


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_head_that_was_tied_can_be_quantized_afterwards(arch: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", arch, tied=True)
    both = rtn("W8A16", targets=["Linear", "lm_head"], ignore=[])
    compressed = laconic.load(press(source, tmp_path / "out", ROTATE, both).path)
    assert "lm_head" in quantized_linears(compressed)
    expected = logits(original(source, torch.float32))
    assert (logits(compressed) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("arch", NORMS_AFTER)
def test_norms_after_sublayers_are_refused(arch: str, laconic: Laconic, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", arch)
    recipe = make_recipe(tmp_path / "recipe.yaml", ROTATE, model=str(source), output=str(tmp_path / "out"))
    assert re.search(
        r"stages.0 \(rotate\): the residual stream .* norm or a scale after", laconic("compress", recipe).complaint
    )


def test_pruned_weights_are_refused_and_may_be_pruned_afterwards(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "sparsity": 0.5}

    def compress(model: Path, *stages: dict[str, object]) -> str:
        recipe = make_recipe(tmp_path / "recipe.yaml", *stages, model=str(model), output=str(tmp_path / "out"))
        return laconic("compress", recipe).complaint

    refused = compress(llama, prune, ROTATE)
    assert refused.endswith("weights pruned by stages.0 (magnitude) would not stay zero; list it before that stage")
    pruned = press(llama, tmp_path / "pruned", prune).path
    assert "50% of model.layers.0.self_attn.q_proj is zero" in compress(pruned, ROTATE)
    zeros = tensors(press(llama, tmp_path / "both", ROTATE, prune).path)["model.layers.0.mlp.up_proj.weight"] == 0
    assert zeros.float().mean() == 0.5


def test_tensors_beside_the_text_model_are_refused(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    save_file(
        weights | {"mtp.proj.weight": torch.ones(64, 64)}, source / "model.safetensors", metadata={"format": "pt"}
    )
    recipe = make_recipe(tmp_path / "recipe.yaml", ROTATE, model=str(source), output=str(tmp_path / "out"))
    assert "1 tensor that is not part of the text model (mtp); they may read" in laconic("compress", recipe).complaint


# 96 = 3 x 32 channels.
def test_rotated_inputs_are_rounded_in_rotated_channels(tmp_path: Path, text: Path) -> None:
    source = make_model(tmp_path / "model", dtype=torch.float32, intermediate_size=96)
    keys = {"scheme": "W4A4", "group_size": 32, "targets": "re:.*down_proj"}
    plain, rotated = (
        laconic.load(press(source, tmp_path / str(r), rtn(**keys, rotate_inputs=r)).path) for r in (False, True)
    )
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 20
    name = "model.layers.0.mlp.down_proj"
    expected = x @ original(source).get_submodule(name).weight.T
    errors = [(m.get_submodule(name)(x) - expected).square().mean() for m in (plain, rotated)]
    assert errors[1] < 0.5 * errors[0]
    # Rounded codes and rounded inputs meet in rotated channels.
    linear = quantized_linears(rotated)[name]
    q = linear.quantized()
    codes = replace(q, input_rotation=False).decode()
    turned, acts = rotate_channels(x), linear.scheme.input_activations
    assert acts is not None
    params = acts.format.fit(turned)
    product = acts.format.decode(acts.format.encode(turned, params), params) @ codes.T
    assert torch.allclose(linear(x), product, atol=1e-4 * float(product.abs().max()))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([rtn("W8A8", rotate_inputs=True, dynamic=False)], "set dynamic: true, or leave rotate_inputs out"),
        ([rtn("W4A4", rotate_inputs=True, outlier_ratio=0.1)], "leave outlier_ratio or rotate_inputs out"),
        ([{"method": "awq", "scheme": "W4A16", "rotate_inputs": True}], "awq cannot rotate inputs; use gptq or rtn"),
        ([{"method": "gptq", "scheme": "W4A4", "rotate_inputs": True, "sparsity": 0.5}], "leave it out, or sparsity"),
        (
            [{"method": "magnitude", "sparsity": 0.5}, rtn("W4A4", group_size=32, rotate_inputs=True)],
            "leave rotate_inputs out, or ignore the linear in one of them",
        ),
    ],
)
def test_what_cannot_have_rotated_inputs_is_told(
    stages: list[dict[str, object]], expected: str, laconic: Laconic, llama: Path, text: Path, tmp_path: Path
) -> None:
    keys = {"calibration": {"dataset": str(text)}, "output": str(tmp_path / "out")}
    recipe = make_recipe(tmp_path / "recipe.yaml", *stages, model=str(llama), **keys)
    assert expected in laconic("compress", recipe).complaint


def test_a_parameter_that_one_block_alone_adds_to_the_stream_is_noticed(laconic: Laconic, tmp_path: Path) -> None:
    """The attention of the last block adds a bias of its own, in no linear."""
    source = make_shrunk(tmp_path / "model", "gpt_neox_japanese")
    recipe = make_recipe(tmp_path / "recipe.yaml", ROTATE, model=str(source), output=str(tmp_path / "out"))
    assert "cannot be rotated" in laconic("compress", recipe).complaint
