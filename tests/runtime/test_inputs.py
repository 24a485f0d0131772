"""Models that are already quantized are read as the 16-bit models that their codes stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import laconic
from artifacts import Stage, logits, original, press, rtn, same_bytes, tensors
from commands import Laconic
from laconic.artifact.size import measure_size
from laconic.formats.packing import unpack
from laconic.pipeline.dequantize import dequantize
from laconic.runtime.embedding import QEmbedding
from laconic.runtime.linear import QLinear
from shrunk import make_shrunk, open_in_transformers
from tiny import make_model, make_tokenizer

Coded = tuple[dict[str, Tensor], Tensor]
"""What a file holds of a linear, and its weight (out, in) by the published formula."""

BLOCK, GROUP = (32, 48), 32
W8 = rtn("W8A16")


def uniform(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def fp8_blocks(weight: Tensor, _: int) -> Coded:
    """DeepSeek-V3: an FP8 matrix, and the factor of each block of it, those at the edges cut off."""
    rows, columns = weight.shape
    grid = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]), generator=torch.Generator().manual_seed(0)) + 0.01
    factors = grid.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
    codes = (weight.float() / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": grid}, codes.float() * factors


def packed(fields: Tensor) -> Tensor:
    """Eight 4-bit fields along the last dimension as one int32, or four of 8 bits, the first in the lowest bits."""
    words = torch.zeros(fields.shape[:-1], dtype=torch.int64)
    for i in range(fields.shape[-1]):
        words |= fields[..., i].long() << 32 // fields.shape[-1] * i
    return words.to(torch.int32)


def gptq(weight: Tensor, seed: int, version: int = 1, order: bool = False, bits: int = 4) -> Coded:
    """GPTQ: codes packed along the inputs; zero points less one in the first version; groups of any columns."""
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // GROUP
    if order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    codes = uniform(2**bits, inputs, outputs, seed=seed)
    zeros = uniform(2**bits - 1, inputs // GROUP, outputs, seed=seed + 1) + 1
    scales = (torch.rand(inputs // GROUP, outputs, generator=torch.Generator().manual_seed(seed)) / 50).half()
    stored = {
        "qweight": packed(codes.view(-1, 32 // bits, outputs).transpose(1, 2)),
        "qzeros": packed((zeros - int(version == 1)).view(len(zeros), -1, 32 // bits)),
        "scales": scales,
        "g_idx": groups.int(),
    }
    w = torch.empty(inputs, outputs)
    for k in range(inputs):
        w[k] = scales[groups[k]].float() * (codes[k] - zeros[groups[k]])
    return stored, w.T


def awq(weight: Tensor, seed: int) -> Coded:
    """AWQ: along the outputs eight codes a word, in the order 0 2 4 6 1 3 5 7."""
    outputs, inputs = weight.shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = uniform(16, inputs, outputs, seed=seed), uniform(16, inputs // GROUP, outputs, seed=seed + 1)
    scales = (torch.rand(inputs // GROUP, outputs, generator=torch.Generator().manual_seed(seed)) / 50).half()
    qweight, qzeros = (packed(t.view(len(t), -1, 8)[..., order]) for t in (codes, zeros))
    w = torch.stack([scales[k // GROUP].float() * (codes[k] - zeros[k // GROUP]) for k in range(inputs)])
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, w.T


FORMATS: dict[str, tuple[Callable[[Tensor, int], Coded], dict[str, Any]]] = {
    "FP8 in blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "GPTQ by activation order": (
        lambda w, seed: gptq(w, seed, order=True),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    ),
    "GPTQ version 2": (
        lambda w, seed: gptq(w, seed, version=2),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "GPTQ in 8 bits": (
        lambda w, seed: gptq(w, seed, bits=8),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP},
    ),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
}


def rewrite(folder: Path, held: dict[str, Tensor], **keys: Any) -> Path:
    save_file({n: t.contiguous() for n, t in held.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def quantized_and_plain(source: Path, tmp_path: Path, name: str, *, conv1d: bool = False) -> tuple[Path, Path]:
    """A model in a format of another tool, and the 16-bit model that it stands for. conv1d: with weights (in, out)."""
    encode, quantization = FORMATS[name]
    coded, plain = (Path(shutil.copytree(source, tmp_path / n)) for n in ("coded", "plain"))
    held, expected = {}, {}
    for seed, (n, t) in enumerate(load_file(source / "model.safetensors").items()):
        held[n] = expected[n] = t
        if n.endswith(("proj.weight", "c_attn.weight", "c_fc.weight")):
            of_linear, weight = encode(t.T if conv1d else t, seed)
            weight = weight.T if conv1d else weight
            del held[n]
            held |= {f"{n.removesuffix('weight')}{leaf}": part for leaf, part in of_linear.items()}
            expected[n] = weight.to(torch.bfloat16)
    (coded / "quantize_config.json").write_text("{}")
    return rewrite(coded, held, quantization_config=quantization), rewrite(plain, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_is_what_its_codes_stand_for(name: str, llama: Path, tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(llama, tmp_path, name)
    assert torch.equal(logits(laconic.load(coded)), logits(laconic.load(plain)))
    written = dequantize(str(coded), tmp_path / "16-bit")
    held, expected = tensors(written), tensors(plain)
    assert held.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) and t.dtype == expected[n].dtype for n, t in held.items())
    assert json.loads((written / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert not (written / "quantize_config.json").exists()
    assert torch.equal(logits(original(written)), logits(original(plain)))
    (warning,) = [w for w in laconic.plan(str(coded), {"stages": [W8]}, tmp_path / "a").warnings if "errors add" in w]
    assert f"14 matrices in {FORMATS[name][1]['quant_method']}" in warning
    artifact, of_plain = press(coded, tmp_path / "a", W8), press(plain, tmp_path / "b", W8)
    assert same_bytes(artifact.path, of_plain.path)
    assert artifact.config == of_plain.config


def test_conv1d_is_decoded_as_it_is_stored_in_sixteen_bits(tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(make_model(tmp_path / "model", "gpt2"), tmp_path, "GPTQ", conv1d=True)
    held, expected = tensors(dequantize(str(coded), tmp_path / "16-bit")), tensors(plain)
    assert all(torch.equal(t, expected[n]) for n, t in held.items())
    assert torch.equal(logits(laconic.load(coded)), logits(laconic.load(plain)))


def test_a_quantized_model_has_its_size(llama: Path, tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(llama, tmp_path, "AWQ")
    size, before = measure_size(coded), measure_size(plain)
    assert size.schemes == {"awq": 14}
    assert size.parameters == before.parameters
    assert size.tensor_bytes == sum(t.nbytes for t in tensors(coded).values())
    linears = sum(t.numel() for n, t in tensors(plain).items() if "proj" in n)
    assert size.covered == linears / size.parameters


def test_fp8_blocks_are_what_transformers_reads(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "BLOCK", (32, 32))
    coded, _ = quantized_and_plain(llama, tmp_path, "FP8 in blocks")
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32], "dequantize": True}
    rewrite(coded, load_file(coded / "model.safetensors"), quantization_config=quantization)
    assert torch.equal(logits(laconic.load(coded)), logits(original(coded)))


def decoded_copy(source: Path, artifact: Path, folder: Path, *, transposed: bool) -> Path:
    """The source with the decoded weights of an artifact in 16 bit."""
    shutil.copytree(source, folder)
    held = load_file(folder / "model.safetensors")
    for name, module in laconic.load(artifact).named_modules():
        if isinstance(module, QLinear | QEmbedding):
            W = module.decode(torch.bfloat16)
            held[f"{name}.weight"] = W.T if transposed else W
    return rewrite(folder, held)


ARTIFACTS: dict[str, tuple[str, Stage]] = {
    "W4A16": ("llama", rtn("W4A16", group_size=32)),
    "W4A16_ASYM": ("llama", rtn("W4A16_ASYM", group_size=32)),
    "W3A16": ("llama", rtn("W3A16", group_size=32)),
    "W8A8": ("llama", rtn("W8A8")),
    "FP8_DYNAMIC": ("llama", rtn("FP8_DYNAMIC")),
    "NVFP4A16": ("llama", rtn("NVFP4A16")),
    "MXFP4A16": ("llama", rtn("MXFP4A16")),
    "native": ("llama", rtn("W4A6", group_size=32, outlier_ratio=0.1)),
    "head and embeddings": ("llama", rtn("W8A16", targets=["Linear", "lm_head", "Embedding"], ignore=[])),
    "experts": ("qwen3_moe", rtn("W8A16")),
    "Conv1D": ("gpt2", rtn("W8A8")),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_our_own_artifacts_are_decoded(name: str, text: Path, tmp_path: Path) -> None:
    arch, stage = ARTIFACTS[name]
    source = make_model(tmp_path / "source", arch)
    artifact = press(source, tmp_path / "artifact", stage, text=text)
    plain = decoded_copy(source, artifact.path, tmp_path / "plain", transposed=arch == "gpt2")
    held, expected = tensors(dequantize(str(artifact.path), tmp_path / "16-bit")), tensors(plain)
    assert held.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) and t.dtype == expected[n].dtype for n, t in held.items())
    if name.endswith("A16"):
        assert torch.equal(logits(original(tmp_path / "16-bit")), logits(original(artifact.path)))
    if name in ("W4A16", "native"):
        again, of_plain = press(artifact.path, tmp_path / "a", W8), press(plain, tmp_path / "b", W8)
        assert same_bytes(again.path, of_plain.path)
        assert again.config == of_plain.config


def test_groups_of_any_columns_are_decoded(llama: Path, tmp_path: Path) -> None:
    """`actorder: group` of compressed-tensors: `weight_g_idx` has the group of each column."""
    folder = press(llama, tmp_path / "artifact", rtn("W4A16", group_size=32)).path
    held, name = tensors(folder), "model.layers.1.mlp.down_proj"
    groups = torch.arange(128) // 32
    groups = groups[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    held[f"{name}.weight_g_idx"] = groups.int()
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("model-*"):
        file.unlink()
    rewrite(folder, held)
    codes = unpack(held[f"{name}.weight_packed"], 4, 128).float()
    expected = (codes * held[f"{name}.weight_scale"].float()[:, groups]).to(torch.bfloat16)
    assert torch.equal(tensors(dequantize(str(folder), tmp_path / "16-bit"))[f"{name}.weight"], expected)
    assert torch.equal(laconic.load(folder).get_submodule(name).weight, expected)


def test_experts_in_mxfp4_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    keys = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**keys, **heads, num_hidden_layers=2), dtype=torch.bfloat16)
    model.save_pretrained(make_tokenizer(tmp_path / "coded"))
    plain = Path(shutil.copytree(tmp_path / "coded", tmp_path / "plain"))
    held = load_file(plain / "model.safetensors")
    expected = dict(held)
    for seed, name in enumerate([n for n in held if n.endswith(("gate_up_proj", "down_proj"))]):
        experts, inputs, outputs = held.pop(name).shape
        blocks = uniform(256, experts, outputs, inputs // 32, 16, seed=seed).to(torch.uint8)
        scales = (uniform(8, experts, outputs, inputs // 32, seed=seed) + 118).to(torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    coded = rewrite(tmp_path / "coded", held, quantization_config={"quant_method": "mxfp4"})
    rewrite(plain, expected)
    written = dequantize(str(coded), tmp_path / "16-bit")
    assert all(torch.equal(t, expected[n]) for n, t in tensors(written).items())
    assert torch.equal(logits(original(written)), logits(original(plain)))
    artifact, of_plain = press(coded, tmp_path / "a", W8), press(plain, tmp_path / "b", W8)
    assert same_bytes(artifact.path, of_plain.path)
    assert artifact.config == of_plain.config


def test_prediction_heads_of_a_quantized_model_are_decoded_too(llama: Path, tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(llama, tmp_path, "FP8 in blocks")
    stored, weight = fp8_blocks(torch.ones(64, 128), 0)
    for folder, extra in ((coded, stored), (plain, {"weight": weight.to(torch.bfloat16)})):
        held = load_file(folder / "model.safetensors")
        rewrite(folder, held | {f"model.layers.2.eh_proj.{leaf}": t for leaf, t in extra.items()})
    artifact, of_plain = press(coded, tmp_path / "a", W8), press(plain, tmp_path / "b", W8)
    assert same_bytes(artifact.path, of_plain.path)
    assert artifact.config == of_plain.config
    assert "model.layers.2.eh_proj" in artifact.config["quantization_config"]["ignore"]


def test_a_quantized_cache_is_left_out_and_an_adapter_copied(llama: Path, text: Path, tmp_path: Path) -> None:
    stages = rtn("W4A16", group_size=32), {"method": "kv_fp8"}
    artifact = press(llama, tmp_path / "artifact", *stages, text=text)
    (artifact.path / "adapter").mkdir()
    (artifact.path / "adapter" / "adapter_config.json").write_text("{}")
    written = dequantize(str(artifact.path), tmp_path / "16-bit")
    assert json.loads((written / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    assert tensors(written).keys() == tensors(llama).keys()
    assert not (written / "kv_cache.safetensors").exists()
    assert (written / "adapter" / "adapter_config.json").exists()
    assert torch.equal(logits(laconic.load(written)), logits(laconic.load(artifact.path)))


LORA = {"method": "lora", "max_steps": 1, "batch_size": 2, "max_seq_length": 32, "rank": 2, "held_out": 0}
WHOLE: dict[str, tuple[str, list[Stage]]] = {
    "depth": ("GPTQ", [{"method": "depth", "blocks": 1}, W8]),
    "llm_pruner": ("AWQ", [{"method": "llm_pruner", "sparsity": 0.25, "uniform": True}]),
    "rotate": ("FP8 in blocks", [{"method": "rotate"}, W8]),
    "lora": ("AWQ", [LORA]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_stages_of_the_whole_model_get_decoded_weights(name: str, llama: Path, text: Path, tmp_path: Path) -> None:
    form, stages = WHOLE[name]
    coded, plain = quantized_and_plain(llama, tmp_path, form)
    stages = [stage | ({"data": [{"dataset": str(text)}]} if stage["method"] == "lora" else {}) for stage in stages]
    artifact = press(coded, tmp_path / "a", *stages, text=text)
    of_plain = press(plain, tmp_path / "b", *stages, text=text)
    assert same_bytes(artifact.path, of_plain.path)
    assert artifact.config == of_plain.config


def test_an_adapter_is_kept_beside_the_codes_of_another_tool(llama: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    coded, plain = quantized_and_plain(llama, tmp_path, "AWQ")
    stage = LORA | {"data": [{"dataset": str(text)}], "keep_adapters": True, "learning_rate": 0.05}
    artifact, of_plain = press(coded, tmp_path / "a", stage), press(plain, tmp_path / "b", stage)
    assert tensors(artifact.path).keys() == tensors(coded).keys()
    assert artifact.config["quantization_config"] == FORMATS["AWQ"][1]
    assert torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(of_plain.path)))
    assert not torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(coded)))


def test_an_interrupted_dequantization_resumes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laconic: Laconic
) -> None:
    coded, _ = quantized_and_plain(llama, tmp_path, "AWQ")
    expected = tensors(dequantize(str(coded), tmp_path / "expected"))
    monkeypatch.setattr("laconic.pipeline.dequantize._SHARD_BYTES", 20_000)

    def die(event: dict[str, Any]) -> None:
        if event["done"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize(str(coded), tmp_path / "out", report=die)
    finished = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.partial").glob("*.safetensors")}
    assert finished
    ran = laconic("dequantize", coded, "-o", tmp_path / "out", "--json")
    assert json.loads(ran.out)["output"] == str(tmp_path / "out")
    held = tensors(tmp_path / "out")
    assert held.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in held.items())
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in finished} == finished
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_what_is_not_read_is_refused_in_one_line(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(llama, tmp_path, "AWQ")
    out = tmp_path / "out"
    assert laconic("dequantize", plain, "-o", out).complaint == f"{plain} is not quantized; use it as it is"
    refused = {
        "is already quantized (bitsandbytes); start from the original 16-bit model": {"quant_method": "bitsandbytes"},
        "layout 'gemv', is not read": {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "GPTQ in 5 bits": {"quant_method": "gptq", "bits": 5},
        "none of its tensors is": {"quant_method": "mxfp4"},
    }
    for message, quantization in refused.items():
        rewrite(coded, load_file(coded / "model.safetensors"), quantization_config=quantization)
        for command in (("dequantize",), ("compress", "--recipe", "rtn-w4a16")):
            assert message in laconic(command[0], coded, *command[1:], "-o", out).complaint
    held, awq = load_file(coded / "model.safetensors"), FORMATS["AWQ"][1]
    damaged = dict(held)
    del damaged["model.layers.1.mlp.up_proj.scales"]
    for tensors_, config, message in (
        (damaged, awq, "tensor 'model.layers.1.mlp.up_proj.scales' is missing"),
        (held, awq | {"group_size": 16}, "is of shape (4, 8), and config.json asks for (8, 8); download the model"),
        (held, awq | {"group_size": None}, "is not read"),
    ):
        rewrite(coded, tensors_, quantization_config=config)
        assert message in laconic("dequantize", coded, "-o", out).complaint
    assert not out.exists()
    assert not Path(f"{out}.partial").exists()


def test_codes_without_their_scale_or_their_description_are_refused(llama: Path, tmp_path: Path) -> None:
    coded, _ = quantized_and_plain(llama, tmp_path, "FP8 in blocks")
    held, name = load_file(coded / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    config = json.loads((coded / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*config.json does not describe"):
        laconic.load(coded)
    del held[f"{name}_scale_inv"]
    rewrite(coded, held, quantization_config=quantization)
    for read in (laconic.load, lambda folder: dequantize(str(folder), tmp_path / "out")):
        with pytest.raises(ValueError, match=f"'{name}' is FP8 and has no scale"):
            read(coded)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "qwen3_vl_moe"])
def test_experts_are_stacked_again_where_transformers_reads_no_others(
    model_type: str, text: Path, tmp_path: Path
) -> None:
    """With biases and interleaved; under a name that transformers changes; transposed in files."""
    source = make_shrunk(tmp_path / "source", model_type)
    artifact = press(source, tmp_path / "artifact", rtn("W4A16", group_size=16))
    written = [dequantize(str(artifact.path), tmp_path / "16-bit")]
    for method in ("magnitude", "reap") if model_type == "gpt_oss" else ("magnitude",):
        written.append(press(artifact.path, tmp_path / method, {"method": method, "sparsity": 0.5}, text=text).path)
    for folder in written:
        model, info = open_in_transformers(folder, info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.allclose(logits(model), logits(laconic.load(folder, dtype=torch.float32)), atol=1e-4)
    expected = logits(laconic.load(artifact.path, decoded=True, dtype=torch.float32))
    assert torch.allclose(logits(open_in_transformers(written[0])), expected, atol=1e-4)


def test_scales_of_a_cache_are_no_part_of_a_model_in_fp8(llama: Path, tmp_path: Path) -> None:
    coded, plain = quantized_and_plain(llama, tmp_path, "FP8 in blocks")
    scales = {f"model.layers.0.self_attn.{n}": torch.tensor(0.5) for n in ("k_proj.k_scale", "v_scale")}
    rewrite(coded, load_file(coded / "model.safetensors") | scales)
    assert tensors(dequantize(str(coded), tmp_path / "16-bit")).keys() == tensors(plain).keys()
