"""Checkpoints that are laid out otherwise than the model is: other names, Conv1D, more than one dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from artifacts import (
    gptq,
    logits,
    matrices,
    original,
    press,
    quantized_linears,
    recipe,
    rtn,
    same_bytes,
    tensors,
    with_decoded_weights,
)
from laconic.pipeline.compression import prepare
from laconic.pipeline.engines import closed_to_transformers
from tiny import make_model

FOUR_BITS = gptq("W4A16", group_size=32)
PREFIXES = {"opt": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox.", "falcon": "transformer."}


def rewrite(folder: Path, change: dict[str, torch.Tensor] | None = None, without: str = "") -> Path:
    """Take a prefix off the names in a checkpoint, and add tensors to it."""
    file = folder / "model.safetensors"
    held = {n.removeprefix(without): t for n, t in load_file(file).items()} | (change or {})
    save_file(held, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("arch", "prefix"), PREFIXES.items())
def test_names_without_the_prefix_of_the_whole_model_stay_so(
    arch: str, prefix: str, text: Path, tmp_path: Path
) -> None:
    whole = press(make_model(tmp_path / "whole", arch), tmp_path / "a", FOUR_BITS, text=text)
    bare = rewrite(make_model(tmp_path / "bare", arch), without=prefix)
    artifact = press(bare, tmp_path / "b", FOUR_BITS, text=text)
    expected = {n.removeprefix(prefix): t for n, t in tensors(whole.path).items()}
    assert tensors(artifact.path).keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in tensors(artifact.path).items())
    # Engines put the prefix back, and look for linears under the names with it.
    assert artifact.config["quantization_config"] == whole.config["quantization_config"]
    assert torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(whole.path)))
    if arch != "gpt2":
        assert torch.equal(logits(original(artifact.path)), logits(with_decoded_weights(bare, artifact.path)))


def test_a_head_with_a_name_of_its_own_keeps_it(text: Path, tmp_path: Path) -> None:
    """GPT-NeoX calls it embed_out in files, lm_head in transformers."""
    folder = make_model(tmp_path / "model", "gpt_neox")
    artifact = press(folder, tmp_path / "a", rtn("W8A16", targets=["Linear", "lm_head"], ignore=[]))
    assert "embed_out.weight_packed" in tensors(artifact.path)
    assert "lm_head" in quantized_linears(laconic.load(artifact.path))
    kept = press(folder, tmp_path / "b", rtn("W8A16"))
    assert {"embed_out", "lm_head"} <= set(kept.config["quantization_config"]["ignore"])


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_conv1d_is_stored_as_vllm_reads_it(scheme: str, text: Path, tmp_path: Path) -> None:
    """It transposes whatever is called `weight`, and nothing else."""
    folder = make_model(tmp_path / "model", "gpt2")
    artifact = press(folder, tmp_path / "a", gptq(scheme, group_size=32 if scheme == "W4A16" else None), text=text)
    held, before = tensors(artifact.path), tensors(folder)
    for name, linear in quantized_linears(laconic.load(artifact.path)).items():
        out, inputs = before[f"{name}.weight"].T.shape
        assert (linear.out_features, linear.in_features) == (out, inputs)
        if scheme == "W4A16":
            assert held[f"{name}.weight_packed"].shape == (out, inputs // 8)
            assert held[f"{name}.weight_scale"].shape == (out, inputs // 32)
        else:
            assert held[f"{name}.weight"].shape == (inputs, out)
            assert held[f"{name}.weight_scale"].shape == (out, 1)
        decoded = linear.decode(torch.float32)
        assert float((decoded - before[f"{name}.weight"].T).norm() / decoded.norm()) < 0.2
    again = press(folder, tmp_path / "b", gptq(scheme, group_size=32 if scheme == "W4A16" else None), text=text)
    assert same_bytes(artifact.path, again.path)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_conv1d_goes_on_after_an_interruption(scheme: str, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2")
    stage = gptq(scheme, targets="re:.*mlp.*", group_size=32 if scheme == "W4A16" else None)
    expected = press(folder, tmp_path / "expected", stage, text=text)

    def die(event: dict) -> None:
        if "h.1." in event.get("linear", ""):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        laconic.compress(str(folder), recipe(stage, text=text), tmp_path / "out", report=die)
    artifact = laconic.compress(str(folder), recipe(stage, text=text), tmp_path / "out")
    assert artifact.results["compress"]["resumed_shards"] == 1
    assert same_bytes(artifact.path, expected.path)


def test_old_buffers_are_left_out(tmp_path: Path) -> None:
    """Masks that transformers stored once, and ignores now."""
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8)}
    folder = rewrite(make_model(tmp_path / "model", "gpt2"), masks)
    artifact = press(folder, tmp_path / "a", rtn("W8A16"))
    assert not any(n.endswith(".attn.bias") for n in tensors(artifact.path))
    assert sum(n.endswith("attn.c_attn.bias") for n in tensors(artifact.path)) == 2


def test_pickled_conv1d_is_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = press(folder, tmp_path / "a", rtn("W4A16", group_size=32))
    (folder / "model.safetensors").unlink()
    what = recipe(rtn("W4A16", group_size=32))
    artifact = laconic.compress(str(folder), what, tmp_path / "b", trust=laconic.Trust(pickle=True))
    assert same_bytes(artifact.path, expected.path)


def test_weights_keep_the_dtype_that_they_have(text: Path, tmp_path: Path) -> None:
    """A norm in float32 beside weights in bfloat16; the run computes in bfloat16, before and after an interruption."""
    name = "model.layers.0.input_layernorm.weight"
    folder = make_model(tmp_path / "model")
    precise = 1 + torch.randn(64, generator=torch.Generator().manual_seed(0)) / 3
    rewrite(folder, {name: precise})
    expected = press(folder, tmp_path / "expected", FOUR_BITS, text=text)
    assert torch.equal(tensors(expected.path)[name], precise)

    def die(event: dict) -> None:
        if "layers.1." in event.get("linear", ""):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        laconic.compress(str(folder), recipe(FOUR_BITS, text=text), tmp_path / "out", report=die)
    artifact = laconic.compress(str(folder), recipe(FOUR_BITS, text=text), tmp_path / "out")
    assert artifact.results["compress"]["resumed_shards"] == 1
    assert same_bytes(artifact.path, expected.path)


VARIANTS = {
    "OPT-350m, narrow embeddings and norms after": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "OPT without biases": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "GPT-2 with scaled attention": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-NeoX in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "Falcon with ALiBi, in sequence": ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "Falcon with a key a head": ("falcon", {"multi_query": False}),
    "Qwen3-MoE, every other layer dense": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "Qwen3-MoE, weights as they come": ("qwen3_moe", {"norm_topk_prob": False}),
}


@pytest.mark.parametrize(("arch", "config"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_variants(arch: str, config: dict, tied: bool, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch, tied, **config)
    stages = [FOUR_BITS] if tied else [FOUR_BITS, gptq("W8A16", targets="lm_head", ignore=[])]
    artifact = press(folder, tmp_path / "a", *stages, text=text, samples=16)
    ours = laconic.load(artifact.path, dtype=torch.float32)
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert quantized_linears(ours).keys() - {"lm_head"} == matrices(original(folder)) - outside
    assert ("lm_head" in quantized_linears(ours)) is not tied
    expected = logits(with_decoded_weights(folder, artifact.path, torch.float32))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


CLOSED = {
    "Conv1D": ("gpt2", [rtn("W4A16", group_size=32)], "quantized Conv1D linears"),
    "Falcon, mixed": (
        "falcon",
        [rtn("W4A16", group_size=32, targets="re:.*mlp.*"), rtn("W8A16", targets="re:.*self_attention.*")],
        "packed weights of more than one scheme in this model",
    ),
    "int8 experts": ("mixtral", [rtn("W8A8")], "experts in W8A8"),
    "experts in FP8 blocks": ("mixtral", [rtn("FP8_BLOCK")], "experts in FP8_BLOCK"),
    "asymmetric experts": ("mixtral", [rtn("W4A16_ASYM", group_size=32)], "experts in W4A16_ASYM"),
    "dense experts": ("mixtral", [rtn("W8A16", ignore="re:.*experts.*")], "16-bit experts beside quantized linears"),
    "mixed experts": (
        "mixtral",
        [rtn("W8A16", targets=r"re:.*\.0\.mlp\.experts.*"), rtn("W4A16", group_size=32, targets=r"re:.*\.1\.mlp.*")],
        "experts of more than one scheme",
    ),
    "NVFP4 experts": ("mixtral", [rtn("NVFP4A16")], "experts in NVFP4A16"),
    "LLM.int8 experts": ("mixtral", [{"method": "llm_int8", "outlier_ratio": 0.05}], "experts in W8A8"),
    "int8 experts and a product": ("qwen3_moe", [rtn("W8A8", low_rank=2)], "experts in W8A8"),
    "mixed zero points": (
        "llama",
        [rtn("W4A16_ASYM", group_size=32, targets="re:.*mlp.*"), rtn("W8A16", targets="re:.*self_attn.*")],
        "zero points mixed with another scheme",
    ),
}


@pytest.mark.parametrize(("arch", "stages", "reason"), CLOSED.values(), ids=CLOSED)
def test_what_transformers_cannot_open_is_said_beforehand(
    arch: str, stages: list, reason: str, text: Path, tmp_path: Path
) -> None:
    blocks = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if "FP8" in str(stages) else {}
    folder = make_model(tmp_path / "model", arch, **blocks)
    prepared = prepare(str(folder), recipe(*stages, text=text), tmp_path / "a")
    said = closed_to_transformers(prepared.walk.plan, prepared.walk.model)
    assert said is not None
    assert said.startswith(reason)
    artifact = press(folder, tmp_path / "a", *stages, text=text)
    expected = logits(laconic.load(artifact.path))
    try:
        theirs = logits(original(artifact.path))
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return
    assert float((theirs - expected).norm() / expected.norm()) > 0.1


OPEN = {
    "experts": ("mixtral", [rtn("W4A16", group_size=32)]),
    "experts and attention": (
        "mixtral",
        [rtn("W8A16", targets="re:.*self_attn.*"), rtn("W4A16", targets="re:.*experts.*", group_size=32)],
    ),
    "FP8 experts": ("mixtral", [rtn("FP8_DYNAMIC")]),
    "MXFP4 experts": ("mixtral", [rtn("MXFP4A16")]),
    "MXFP4 experts, rounded activations": ("mixtral", [rtn("MXFP4")]),
    "MXFP4 experts of another family": ("qwen3_moe", [rtn("MXFP4A16")]),
    "LLM.int8 beside experts": ("mixtral", [{"method": "llm_int8", "outlier_ratio": 0.05, "ignore": "re:.*experts.*"}]),
    "simulated": ("qwen3_moe", [rtn("W6A6")]),
    "simulated experts": ("mixtral", [rtn("W6A6", targets="re:.*experts.*")]),
    "Falcon": ("falcon", [rtn("W4A16", group_size=32)]),
}


@pytest.mark.parametrize(("arch", "stages"), OPEN.values(), ids=OPEN)
def test_what_transformers_opens(arch: str, stages: list, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    prepared = prepare(str(folder), recipe(*stages, text=text), tmp_path / "a")
    assert closed_to_transformers(prepared.walk.plan, prepared.walk.model) is None
    artifact = press(folder, tmp_path / "a", *stages, text=text)
    theirs, ours = original(artifact.path), laconic.load(artifact.path)
    if stages[0].get("scheme") in ("FP8_DYNAMIC", "MXFP4"):
        # It leaves the activations of experts as they are, so that only weights can be compared.
        name = "model.layers.1.mlp.experts.down_proj"
        decoded = with_decoded_weights(folder, artifact.path).get_parameter(name)
        assert torch.equal(theirs.get_parameter(name), decoded)
    else:
        assert torch.equal(logits(theirs), logits(ours))


def test_transformers_says_that_it_cannot_read_a_simulated_conv1d(tmp_path: Path) -> None:
    artifact = press(make_model(tmp_path / "model", "gpt2"), tmp_path / "a", rtn("W6A6"))
    with pytest.raises(ValueError, match=r"transformers cannot read transformer\.h\.0\.attn\.c_attn as it is stored"):
        original(artifact.path)
    assert json.loads((artifact.path / "config.json").read_text())["quantization_config"]["quant_method"] == "laconic"
