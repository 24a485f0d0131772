"""Mixtures of experts: taken apart they compute the same, each expert is calibrated on its own tokens, and what is
written has the names that engines know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, Qwen2MoeConfig

import laconic
from artifacts import (
    gptq,
    inputs,
    linear_events,
    logits,
    original,
    press,
    quantized_linears,
    recipe,
    rtn,
    same_bytes,
    tensors,
    tokens,
    windows,
    with_decoded_weights,
)
from commands import Laconic
from laconic.checkpoint.source import build_skeleton
from laconic.structure.anatomy import dissect, observation_rounds
from laconic.structure.experts import Experts, calibrate_all_experts
from shrunk import make_shrunk, open_in_transformers, shrunk_config
from tiny import MIXTURES, make_model, make_recipe
from watching import Watch, stroll

every_mixture = pytest.mark.parametrize("arch", MIXTURES)
ALL = {"moe_calibrate_all_experts": True}
AWQ = {"method": "awq", "scheme": "W4A16", "group_size": 32, "unlinked": "skip"}
AUTOROUND = {"method": "autoround", "scheme": "W4A16", "group_size": 32, "iters": 10}
ZEROQUANT = {"method": "zeroquant", "group_size": 32, "iters": 10}


def experts_of(folder: Path, dtype: torch.dtype = torch.float32) -> list[Experts]:
    return [m for m in laconic.load(folder, dtype=dtype).modules() if isinstance(m, Experts)]


def file_name(arch: str, name: str) -> str:
    """What the Hub calls a linear of a model."""
    return name.replace(".mlp.", ".block_sparse_moe.") if arch == "mixtral" else name


@every_mixture
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_their_own_compute_what_stacked_ones_do(arch: str, implementation: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, arch, dtype=torch.float32)
    stacked = original(folder)
    stacked.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(laconic.load(folder)), logits(stacked), rtol=1e-5, atol=1e-5)


@every_mixture
def test_every_token_for_every_expert_is_shown_and_changes_nothing(arch: str, tmp_path: Path) -> None:
    experts = experts_of(make_model(tmp_path, arch))[0]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    # No token is for the last expert.
    index = torch.stack([torch.arange(40) % 3, (torch.arange(40) + 1) % 3], 1)
    weights = torch.full((40, 2), 0.5)
    seen: dict[str, int] = {}
    for name, linear in experts.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(lambda _, args, n=name: seen.__setitem__(n, len(args[0])))
    expected = experts(x, index, weights)
    assert {n for n in seen if n.startswith("3.")} == set()
    with calibrate_all_experts(experts):
        assert torch.equal(experts(x, index, weights), expected)
    assert len(seen) == 12
    assert set(seen.values()) == {40}
    assert torch.equal(experts(x, index, weights), expected)


@every_mixture
@pytest.mark.parametrize(
    "stage",
    [
        gptq("W4A16", group_size=32, true_sequential=False),
        AWQ,
        ZEROQUANT,
        AUTOROUND | {"asymmetric_calibration": False},
    ],
    ids=lambda s: s["method"],
)
def test_the_log_counts_the_tokens_that_the_router_sent(
    arch: str, stage: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", arch)
    artifact = press(folder, tmp_path / "out", stage, text=text)
    told = {e["linear"]: e["tokens"] for e in artifact.log if e["event"] == "linear"}
    names = [n for n in told if n.startswith("model.layers.0.mlp.experts.")]
    assert len(names) == 12
    seen = inputs(original(folder), windows(folder, text), names)
    assert {n: told[n] for n in names} == {n: len(x) for n, x in seen.items()}
    assert sum(told[n] for n in names) == 3 * 2 * 8 * 32


@every_mixture
def test_an_expert_without_tokens_is_named(arch: str, text: Path, tmp_path: Path) -> None:
    many = {"num_local_experts" if arch == "mixtral" else "num_experts": 16}
    folder = make_model(tmp_path / "model", arch, **many)
    few = {"text": text, "samples": 1, "length": 4}
    said = r"model\.layers\.0\.mlp\.experts\.\d+\.\w+: no calibration token .* calibration\.moe_calibrate_all_experts"
    for number, stage in enumerate(
        [
            gptq("W4A16", group_size=32),
            rtn("W8A8", dynamic=False),
            AWQ,
            ZEROQUANT,
            AUTOROUND | {"asymmetric_calibration": False},
        ]
    ):
        with pytest.raises(ValueError, match=said):
            press(folder, tmp_path / f"without {number}", stage, **few)
    artifact = press(folder, tmp_path / "all", gptq("W4A16", group_size=32), **few, **ALL)
    assert {e["tokens"] for e in linear_events(artifact)} == {4}
    assert torch.equal(logits(laconic.load(artifact.path)), logits(with_decoded_weights(folder, artifact.path)))
    # A method that needs no data asks for none.
    press(folder, tmp_path / "rtn", rtn("W4A16", group_size=32), text=text)


@pytest.mark.parametrize("stage", [gptq("W4A16", group_size=32), AWQ], ids=lambda s: s["method"])
def test_what_is_advised_for_an_expert_without_tokens_can_be_followed(
    stage: dict[str, Any], text: Path, tmp_path: Path, laconic: Laconic
) -> None:
    folder = make_model(tmp_path / "model", "mixtral", num_local_experts=16)
    calibration = recipe(text=text, samples=1, length=4)["calibration"]

    def run(*options: str, **keys: bool) -> Any:
        file = make_recipe(tmp_path / "r.yaml", stage, calibration=calibration | keys)
        return laconic("compress", folder, "--recipe", file, "--output", tmp_path / "out", *options)

    said = run().complaint
    assert said.endswith(
        "use more samples, or set calibration.moe_calibrate_all_experts, and pass --overwrite, since finished "
        "blocks are of this recipe"
    )
    assert run("--overwrite", **ALL).code == 0


def test_few_tokens_are_told(text: Path, tmp_path: Path, laconic: Laconic) -> None:
    folder = make_model(tmp_path / "model", "mixtral", num_local_experts=2)
    calibration = recipe(text=text, samples=1)["calibration"]
    file = make_recipe(tmp_path / "r.yaml", gptq("W4A16", group_size=32), calibration=calibration)
    ran = laconic("compress", folder, "--recipe", file, "--output", tmp_path / "out")
    assert ran.code == 0
    assert "note: 8 inputs of linears saw fewer tokens than they are wide, the least model.layers.0.mlp" in ran.err
    assert "32 calibration tokens for 64 inputs" in ran.err


def test_a_step_may_pass_an_expert_by(text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mixtral", num_local_experts=16)
    one = ZEROQUANT | {"targets": r"re:.*experts\.3\..*", "batch_size": 1}
    rest = rtn("W4A8", group_size=32, targets="re:.*experts.*", ignore=one["targets"])
    artifact = press(folder, tmp_path / "out", rest, one, text=text, samples=64, length=4)
    tuned = [e for e in artifact.log if e.get("method") == "zeroquant"]
    assert len(tuned) == 6
    assert all(e["tokens"] > 0 for e in tuned)


@every_mixture
def test_an_expert_that_could_learn_nothing_is_told(arch: str, text: Path, tmp_path: Path) -> None:
    many = {"num_local_experts" if arch == "mixtral" else "num_experts": 16}
    folder = make_model(tmp_path / "model", arch, **many)
    artifact = press(folder, tmp_path / "out", ZEROQUANT, text=text, samples=1, length=4, **ALL)
    untaught = {e["linear"] for e in artifact.log if e["event"] == "linear" and e["tokens"] == 0}
    told = {e["linear"] for e in artifact.log if e["event"] == "few_tokens" and e["tokens"] == 0}
    assert untaught
    assert told <= untaught
    assert {n.rpartition(".")[0] for n in told} == {n.rpartition(".")[0] for n in untaught}


@every_mixture
@pytest.mark.parametrize("options", [{}, ALL], ids=["routed", "all"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    arch: str, options: dict[str, bool], text: Path, tmp_path: Path
) -> None:
    folder, stage = make_model(tmp_path / "model", arch), gptq("W4A16", group_size=32)
    expected = press(folder, tmp_path / "expected", stage, text=text, samples=16, **options)

    class Killed(BaseException):
        pass

    def die(event: dict) -> None:
        if "layers.1.mlp.experts.2" in event.get("linear", ""):
            raise Killed

    what = recipe(stage, text=text, samples=16, **options)
    with pytest.raises(Killed):
        laconic.compress(str(folder), what, tmp_path / "out", report=die)
    artifact = laconic.compress(str(folder), what, tmp_path / "out")
    assert artifact.results["compress"]["resumed_shards"] == 1
    assert same_bytes(artifact.path, expected.path)


@every_mixture
def test_matching_the_original_needs_the_same_tokens(arch: str, text: Path, tmp_path: Path) -> None:
    folder, stage = make_model(tmp_path / "model", arch), gptq("W4A16", group_size=32, asymmetric_calibration=1.0)
    with pytest.raises(ValueError, match=r"experts read other tokens; set calibration\.moe_calibrate_all_experts"):
        press(folder, tmp_path / "out", stage, text=text)
    artifact = press(folder, tmp_path / "out", stage, text=text, **ALL)
    assert {e["tokens"] for e in linear_events(artifact)} == {8 * 32}
    attention_only = stage | {"ignore": "re:.*experts.*"}
    assert len(quantized_linears(laconic.load(press(folder, tmp_path / "b", attention_only, text=text).path))) == 8


@pytest.mark.parametrize("stage", [AWQ, AUTOROUND, ZEROQUANT], ids=lambda s: s["method"])
def test_block_methods_work_on_experts_that_are_shown_every_token(
    stage: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
    only = stage | {"targets": "re:.*experts.*"}
    artifact = press(folder, tmp_path / "out", only, text=text, **ALL)
    if stage is AWQ:
        assert any(e["ratio"] > 0 for e in artifact.log if e["event"] == "linear")
    else:
        assert all(e["loss_after"] < e["loss_before"] for e in artifact.log if e["event"] == "linear")
        plain = press(folder, tmp_path / "rtn", rtn(only.get("scheme", "W4A8"), group_size=32, targets=only["targets"]))
        ours, nearest = tensors(artifact.path), tensors(plain.path)
        codes = [n for n in ours if n.endswith(("experts.0.w2.weight", "experts.0.w2.weight_packed"))]
        assert codes
        assert not any(torch.equal(ours[n], nearest[n]) for n in codes)


@every_mixture
def test_experts_of_a_layer_share_a_scheme(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    with pytest.raises(ValueError, match=r"the experts of a layer must share a scheme.*experts\.0.*: W8A16.*: 16 bit"):
        press(folder, tmp_path / "out", rtn("W8A16", targets=r"re:.*experts\.0\..*"))


@every_mixture
def test_what_engines_are_told(arch: str, tmp_path: Path) -> None:
    """vLLM makes a linear of the router, and knows Mixtral's layers by other names than transformers."""
    folder = make_model(tmp_path / "model", arch)
    everything = press(folder, tmp_path / "a", rtn("W4A16", group_size=32))
    told = everything.config["quantization_config"]
    for i in range(2):
        assert file_name(arch, f"model.layers.{i}.mlp.gate") in told["ignore"]
    assert [g["targets"] for g in told["config_groups"].values()] == [["Linear"]]
    attention = press(folder, tmp_path / "b", rtn("W4A16", group_size=32, ignore="re:.*experts.*"))
    assert r"re:.*\.experts\.\d+\..*" in attention.config["quantization_config"]["ignore"]
    assert len(quantized_linears(laconic.load(attention.path))) == 8


@every_mixture
def test_transformers_opens_experts_of_their_own_scheme(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    stages = [
        rtn("W8A16", targets="re:.*self_attn.*"),
        rtn("W4A16", group_size=32, targets="re:.*experts.*"),
    ]
    for order in (stages, stages[::-1]):
        artifact = press(folder, tmp_path / order[0]["scheme"], *order)
        assert torch.equal(logits(original(artifact.path)), logits(with_decoded_weights(folder, artifact.path)))


@every_mixture
def test_a_stacked_checkpoint_is_read_and_stays_stacked_where_nothing_changes(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    stacked = make_model(tmp_path / "stacked", arch)
    original(folder).save_pretrained(stacked, save_original_format=False)
    before = tensors(stacked)
    assert before["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 2 * before[DOWN].shape[2], 64)
    assert torch.equal(logits(laconic.load(stacked)), logits(laconic.load(folder)))
    dense = press(stacked, tmp_path / "dense", rtn("W8A16", targets="re:.*self_attn.*"))
    after = tensors(dense.path)
    assert all(torch.equal(after[n], t) for n, t in before.items() if "self_attn" not in n)
    assert not any("experts.0." in n for n in after)
    assert torch.equal(logits(laconic.load(dense.path)), logits(with_decoded_weights(stacked, dense.path)))
    for number, stage in enumerate([rtn("W4A16", group_size=32), rtn("W8A8")]):
        codes = press(stacked, tmp_path / str(number), stage)
        twin = press(folder, tmp_path / f"twin {number}", stage)
        names = {file_name(arch, n): t for n, t in tensors(codes.path).items()}
        assert {n: t for n, t in tensors(twin.path).items() if not torch.equal(names[n], t)} == {}
        assert torch.equal(logits(laconic.load(codes.path)), logits(laconic.load(twin.path)))


DOWN = "model.layers.0.mlp.experts.down_proj"


def test_taps_of_all_experts_are_observed_together(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_model(tmp_path, "mixtral"))
    taps = dissect(build_skeleton(config, torch.bfloat16)).taps[0]
    assert [len(together) for together in observation_rounds(taps)] == [1, 1, 4, 4]
    assert [t for together in observation_rounds(taps) for t in together] == list(taps)


def test_what_weighs_a_shared_expert_is_no_target() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = Qwen2MoeConfig(**sizes, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    anatomy = dissect(build_skeleton(config, torch.bfloat16))
    assert anatomy.routers == {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"}


def test_experts_that_are_kept_otherwise_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'jetmoe': its experts \(model\.layers\.0\.mlp\.input_linear\) are stored in"
    ):
        build_skeleton(shrunk_config("jetmoe"), torch.bfloat16)


# Biases, and gates and ups that alternate; tokens sorted by expert; no gate; transposed in files.
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "nemotron_h", "qwen3_vl_moe"])
def test_experts_of_other_layouts_compute_the_same(model_type: str, tmp_path: Path) -> None:
    folder = make_shrunk(tmp_path, model_type)
    ours, theirs = laconic.load(folder, dtype=torch.float32), open_in_transformers(folder)
    assert any(isinstance(m, Experts) for m in ours.modules())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_quantized_experts_under_names_of_transformers_are_read_back(tmp_path: Path) -> None:
    # In files of a Granite they are `input_linear` and `output_linear`, which name no single expert.
    artifact = press(make_shrunk(tmp_path / "model", "granitemoe"), tmp_path / "artifact", rtn("W4A16", group_size=16))
    held = tensors(artifact.path)
    assert "model.layers.0.block_sparse_moe.experts.3.down_proj.weight_packed" in held
    assert not any("input_linear" in n for n in held)
    assert sum(".experts." in n for n in quantized_linears(laconic.load(artifact.path))) == 2 * 4 * 3


def test_biases_of_quantized_experts_are_stored_beside_them(tmp_path: Path) -> None:
    artifact = press(make_shrunk(tmp_path / "model", "gpt_oss"), tmp_path / "artifact", rtn("W4A16", group_size=16))
    held = tensors(artifact.path)
    assert "model.layers.0.mlp.experts.0.up_proj.bias" in held
    assert not any("proj_bias" in n for n in held)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mixtral")
    file = folder / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.1\.mlp\.experts\.2\.w3\.weight'"):
        press(folder, tmp_path / "out", rtn("W8A16"))


@every_mixture
@pytest.mark.parametrize("all_experts", [False, True])
def test_moments_are_those_of_the_tokens_shown(arch: str, all_experts: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch, dtype=torch.float32)
    (seen,) = stroll(folder, tmp_path / "out", tokens(6, 40), Watch(), all_experts=all_experts)
    expected = inputs(original(folder), tokens(6, 40), list(seen), all_experts=all_experts)
    for name, moments in seen.items():
        x = expected[name]
        assert moments.tokens == len(x)
        torch.testing.assert_close(moments.H.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-3 * float((x * x).mean()))
