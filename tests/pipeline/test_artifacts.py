"""What recipes make of a model: stages beside each other, static scales, and nothing that depends on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import laconic
from artifacts import (
    Stage,
    gptq,
    inputs,
    linear_events,
    original,
    press,
    quantized_linears,
    rtn,
    same_bytes,
    tensors,
    windows,
)
from laconic import Artifact
from tiny import make_model

ATTENTION, MLP = "re:.*self_attn.*", "re:.*mlp.*"
W4 = gptq("W4A16", group_size=32)


@pytest.fixture(scope="module")
def four_bits(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(llama, tmp_path_factory.mktemp("artifacts") / "w4", W4, text=text)


def test_activations_in_a_file_give_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, four_bits: Artifact
) -> None:
    spilled = press(llama, tmp_path / "spilled", W4, text=text, max_memory_gb=1e-9)
    assert same_bytes(spilled.path, four_bits.path)
    assert not list(spilled.path.glob("activations*"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_how_many_samples_run_at_once_hardly_matters(
    batch_size: int, llama: Path, text: Path, tmp_path: Path, four_bits: Artifact
) -> None:
    other = press(llama, tmp_path / "other", W4, text=text, batch_size=batch_size)
    for ours, theirs in zip(linear_events(other), linear_events(four_bits), strict=True):
        assert ours["tokens"] == theirs["tokens"] == 8 * 32
        assert ours["output_error"] == pytest.approx(theirs["output_error"], rel=0.05)


def test_stages_on_disjoint_linears_each_do_their_own(llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(
        llama, tmp_path / "two", rtn("W8A16", targets=ATTENTION), gptq("W3A16", group_size=32, targets=MLP), text=text
    )
    for name, linear in quantized_linears(laconic.load(artifact.path)).items():
        assert linear.scheme.name == ("W8A16" if "self_attn" in name else "W3A16")
    told = {e["linear"]: (e["method"], e["scheme"]) for e in linear_events(artifact)}
    assert told == {
        n: ("rtn", "W8A16") if "self_attn" in n else ("gptq", "W3A16")
        for n in quantized_linears(laconic.load(artifact.path))
    }


def test_what_a_stage_makes_of_its_linears_is_what_it_makes_alone(llama: Path, tmp_path: Path) -> None:
    stages = rtn("W8A16", targets=ATTENTION), rtn("W4A16", group_size=32, targets=MLP)
    both = tensors(press(llama, tmp_path / "both", *stages).path)
    for i, (stage, part) in enumerate(zip(stages, ("self_attn", "mlp"), strict=True)):
        alone = tensors(press(llama, tmp_path / str(i), stage).path)
        for name in (n for n in alone if part in n):
            assert torch.equal(alone[name], both[name])


@pytest.mark.parametrize("stage", [rtn("FP8"), rtn("W8A8", strategy="tensor"), gptq("FP8")], ids=str)
def test_linears_that_engines_fuse_have_one_scale_where_a_tensor_has_one(
    stage: Stage, llama: Path, text: Path, tmp_path: Path
) -> None:
    stored = tensors(press(llama, tmp_path / "artifact", stage, text=text).path)
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        (scale,) = {float(stored[f"model.layers.0.{name}.weight_scale"]) for name in fused}
        assert scale != float(stored["model.layers.0.mlp.down_proj.weight_scale"])


@pytest.mark.parametrize(
    "stages",
    [
        ([rtn("W8A16"), rtn("W8A16", targets=MLP)], "would quantize model.layers.0.mlp.gate_proj a second time"),
        ([rtn("W8A16", targets="re:.*q_proj")], "linears that read one input must share a scheme"),
        ([rtn("W8A16", targets="re:.*qproj")], r"matches no linear of this model; did you mean 're:\.\*q_proj'"),
        ([rtn("W8A16", ignore="re:.*")], "ignores every linear that it targets"),
        ([rtn("W4A16", group_size=48)], "group_size 48 does not divide the 64 inputs"),
        ([rtn("FP8_BLOCK")], "rounds activations in groups of 128, which does not divide the 64 inputs"),
        ([gptq("W4A16", group_size=32)], "gptq needs calibration text"),
        ([rtn("FP8")], "static activations needs calibration text"),
        ([rtn("NVFP4")], "static activations needs calibration text"),
    ],
    ids=lambda s: s[1],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(
    stages: tuple[list[Stage], str], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=stages[1]):
        press(llama, tmp_path / "artifact", *stages[0])
    assert not list(tmp_path.iterdir())


STATIC = [("FP8", 448, {}), ("W8A8", 127, {"dynamic": False}), ("W6A6", 31, {"dynamic": False})]


@pytest.mark.parametrize(("scheme", "largest", "keys"), STATIC, ids=lambda v: str(v))
def test_a_static_scale_is_the_largest_input_over_the_largest_code(
    scheme: str, largest: int, keys: dict, text: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.float32)
    ours = laconic.load(press(folder, tmp_path / "artifact", rtn(scheme, **keys), text=text).path)
    scales = {name: float(linear.input_scale) for name, linear in quantized_linears(ours).items()}
    # The walk shows a linear what the compressed ones before it put out, as the finished model does.
    for name, seen in inputs(ours, windows(folder, text), list(scales)).items():
        assert scales[name] == pytest.approx(float(seen.abs().max()) / largest, rel=1e-4)
    first = "model.layers.0.self_attn.q_proj"
    (seen,) = inputs(original(folder), windows(folder, text), [first]).values()
    assert scales[first] == pytest.approx(float(seen.abs().max()) / largest, rel=1e-6)


def test_nvfp4_has_one_scale_a_tensor_for_what_engines_fuse_and_one_for_its_inputs(text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.float32)
    artifact = press(folder, tmp_path / "artifact", gptq("NVFP4"), text=text)
    stored, before = tensors(artifact.path), tensors(folder)
    name = "model.layers.0.{}.{}".format
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        (scale,) = {float(stored[name(linear, "weight_global_scale")]) for linear in fused}
        largest = max(float(before[name(linear, "weight")].abs().max()) for linear in fused)
        assert scale == pytest.approx(448 * 6 / largest)
        assert len({float(stored[name(linear, "input_global_scale")]) for linear in fused}) == 1
    ours = laconic.load(artifact.path)
    linears = quantized_linears(ours)
    for linear, seen in inputs(ours, windows(folder, text), list(linears)).items():
        assert float(linears[linear].input_global_scale) == pytest.approx(448 * 6 / float(seen.abs().max()), rel=1e-4)


SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
PEAK = """
import sys, laconic
laconic.compress(sys.argv[1], {"stages": [{"method": "rtn", "scheme": "FP8"}], "calibration": {
    "dataset": sys.argv[2], "num_calibration_samples": 4, "max_seq_length": 32}}, sys.argv[3])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read where Linux keeps it")
def test_memory_does_not_grow_with_the_number_of_blocks(text: Path, tmp_path: Path) -> None:
    def peak(blocks: int) -> int:
        folder = make_model(tmp_path / str(blocks), dtype=torch.float32, num_hidden_layers=blocks, **SHAPE)
        command = [sys.executable, "-c", PEAK, str(folder), str(text), str(tmp_path / f"{blocks}-fp8")]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024

    block = 4 * (4 * 512**2 + 3 * 512 * 1408)
    assert peak(16) - peak(4) < 4 * block
