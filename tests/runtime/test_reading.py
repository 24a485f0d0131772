"""Artifacts as three readers see them: laconic, compressed-tensors by itself, and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import AutoModelForCausalLM, PreTrainedModel

import laconic
from artifacts import gptq, logits, original, press, quantized_linears, rtn, tensors, with_decoded_weights
from laconic.formats.int_affine import IntAffine
from laconic.formats.schemes import PRESETS
from tiny import make_model

WEIGHT_ONLY = [name for name, scheme in PRESETS.items() if scheme.input_activations is None]
NATIVE = [name for name, scheme in PRESETS.items() if scheme.simulated]


@pytest.fixture(scope="module", params=PRESETS)
def pressed(request: pytest.FixtureRequest, wide: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of every preset, just as it is."""
    return press(wide, tmp_path_factory.mktemp("artifacts") / request.param, rtn(request.param), text=text).path


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a - b).norm() / b.norm()) < tolerance


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weight of every linear of a model that transformers opened, decompressed if it is still compressed."""
    logits(model)
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_transformers_opens_every_preset_to_the_weights_that_were_chosen(pressed: Path, wide: Path) -> None:
    theirs = original(pressed)
    if pressed.name in NATIVE:
        assert torch.equal(logits(theirs), logits(laconic.load(pressed)))
        return
    expected = weights_of(with_decoded_weights(wide, pressed))
    found = weights_of(theirs)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # Two readers may round to bfloat16 once before the product with the scale, or once after it.
        torch.testing.assert_close(weight, expected[name], rtol=2**-7, atol=0)


def test_transformers_and_laconic_make_the_same_of_an_input(pressed: Path) -> None:
    theirs, ours = in_float32(pressed), laconic.load(pressed, dtype=torch.float32)
    acts = PRESETS[pressed.name].input_activations
    # Transformers spreads an integer activation over 127.5 steps, engines and we over 127.
    spread = acts is not None and isinstance(acts.format, IntAffine) and pressed.name not in NATIVE
    # It also decodes an asymmetric weight, and FP4, to bfloat16, whatever it computes in.
    if "FP4" in pressed.name:
        weights = weights_of(theirs)
        for name, linear in quantized_linears(ours).items():
            linear.dense = weights[name].float()
    tolerance = 0.1 if spread else 0.02 if pressed.name == "W4A16_ASYM" else 1e-4
    assert close(logits(theirs), logits(ours), tolerance)


def in_float32(folder: Path) -> PreTrainedModel:
    """The model that transformers makes of a folder, computing in float32."""
    if folder.name not in ("NVFP4", "MXFP4"):
        return original(folder, torch.float32)
    # It can do that only after it has decoded the weights, to bfloat16.
    model = original(folder)
    logits(model)
    return torch.nn.Module.float(model)


def test_laconic_reads_what_transformers_would_with_the_decoded_weights(pressed: Path, wide: Path) -> None:
    if PRESETS[pressed.name].input_activations is None:
        expected = logits(with_decoded_weights(wide, pressed))
        assert torch.equal(logits(laconic.load(pressed)), expected)


def test_decoding_in_every_pass_gives_the_same_logits(pressed: Path) -> None:
    assert torch.equal(logits(laconic.load(pressed, packed=True)), logits(laconic.load(pressed)))


def test_it_can_be_computed_in_another_dtype(pressed: Path, wide: Path) -> None:
    precise = laconic.load(pressed, dtype=torch.float32)
    assert {p.dtype for p in precise.parameters() if p.is_floating_point() and p.element_size() > 1} == {torch.float32}
    if PRESETS[pressed.name].input_activations is None:
        assert torch.equal(logits(precise), logits(with_decoded_weights(wide, pressed, torch.float32)))


ATTENTION, MLP = "re:.*self_attn.*", "re:.*mlp.*"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small", tied=request.param)


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([rtn("W4A16_ASYM", group_size=32)], id="asymmetric"),
        pytest.param([rtn("W4A16", group_size=32, ignore=["lm_head", "re:.*layers.1.*"])], id="one block plain"),
        pytest.param([gptq("W8A16", targets="re:.*down_proj")], id="one linear a block"),
        pytest.param(
            [rtn("W8A16", targets=ATTENTION), rtn("W3A16", group_size=32, targets=MLP)],
            id="two schemes",
        ),
        pytest.param(
            [rtn("W4A16_ASYM", group_size=32, targets=ATTENTION), rtn("W2A16", group_size=32, targets=MLP)],
            id="two schemes, one asymmetric",
            marks=pytest.mark.xfail(
                raises=RuntimeError,
                strict=True,
                reason="transformers expects packed zero points in their unpacked shape, unless it decodes while "
                "loading, which it does by one scheme only",
            ),
        ),
    ],
)
def test_transformers_reads_mixtures_and_tied_heads(
    stages: list[dict[str, Any]], small: Path, text: Path, tmp_path: Path
) -> None:
    artifact = press(small, tmp_path / "artifact", *stages, text=text)
    ours = logits(laconic.load(artifact.path))
    assert torch.equal(ours, logits(with_decoded_weights(small, artifact.path)))
    assert close(logits(original(artifact.path)), ours, 0.02)


@pytest.mark.parametrize("pair", [("W8A8", "W6A6"), ("FP8", "W4A6"), ("W4A16_ASYM", "W6A6")], ids="+".join)
def test_a_scheme_that_engines_run_may_stand_beside_one_they_do_not(
    pair: tuple[str, str], wide: Path, text: Path, tmp_path: Path
) -> None:
    stages = [rtn(p, targets=f"re:.*{part}.*") for p, part in zip(pair, ("self_attn", "mlp"), strict=True)]
    artifact = press(wide, tmp_path / "artifact", *stages, text=text)
    linears = quantized_linears(laconic.load(artifact.path))
    assert {linear.scheme.name for linear in linears.values()} == set(pair)
    assert torch.equal(logits(original(artifact.path)), logits(laconic.load(artifact.path)))


GROUP = {"targets": ["Linear"]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = INT8 | {"type": "float"}
NVFP4, MXFP4 = (PRESET_SCHEMES[name]["weights"].model_dump() for name in ("NVFP4", "MXFP4"))
TOKEN = {"strategy": "token", "dynamic": True}
WHOLE = {"strategy": "tensor"}


def written_by_compressed_tensors(model: PreTrainedModel, group: dict[str, Any], folder: Path) -> torch.Tensor:
    """Quantize and save a model by their means alone. Returns: its logits before compression."""
    config = {"config_groups": {"group_0": GROUP | group}, "ignore": ["lm_head"], "quantization_status": "calibration"}
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            args, rows = scheme.weights, module.out_features
            groups = (rows, -1, args.group_size)
            layouts = {"tensor": (1, -1), "channel": (rows, 1, -1), "group": groups, "tensor_group": groups}
            tiles = module.weight.reshape(layouts[args.strategy])
            lo, hi = tiles.amin(-1), tiles.amax(-1)
            if (whole := getattr(module, "weight_global_scale", None)) is not None:
                whole.data = generate_gparam(lo.amin(), hi.amax())
            module.weight_scale.data, module.weight_zero_point.data = calculate_qparams(lo, hi, args, whole)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.02)
            module.quantization_status = QuantizationStatus.FROZEN
    before = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return before


@pytest.mark.parametrize(
    ("name", "group", "tolerance"),
    [
        ("W4A16", {"weights": INT4}, 1e-5),
        ("W4A16_ASYM", {"weights": INT4 | {"symmetric": False}}, 1e-5),
        ("W8A16", {"weights": INT8}, 1e-5),
        # They spread an activation over 127.5 steps, engines and we over 127.
        ("W8A8", {"weights": INT8, "input_activations": INT8 | TOKEN}, 0.1),
        ("W4A8", {"weights": INT4, "input_activations": INT8 | TOKEN, "format": "int-quantized"}, 0.1),
        ("FP8_DYNAMIC", {"weights": FLOAT8, "input_activations": FLOAT8 | TOKEN}, 1e-4),
        ("FP8", {"weights": FLOAT8 | WHOLE, "input_activations": FLOAT8 | WHOLE}, 1e-4),
        ("FP8", {"weights": FLOAT8, "input_activations": FLOAT8 | WHOLE}, 1e-4),
        # They decode FP4 to bfloat16, and cannot multiply it with anything else.
        ("NVFP4A16", {"weights": NVFP4}, 0.02),
        ("MXFP4A16", {"weights": MXFP4}, 0.02),
    ],
)
def test_a_checkpoint_of_compressed_tensors_is_read_as_it_was_meant(
    name: str, group: dict[str, Any], tolerance: float, exact: Path, wide: Path, tmp_path: Path
) -> None:
    theirs = original(wide if "FP4" in name else exact)
    before = written_by_compressed_tensors(theirs, group, tmp_path)
    ours, decoded = laconic.load(tmp_path), weights_of(theirs)
    for linear, quantized in quantized_linears(ours).items():
        assert quantized.scheme.name == name
        assert torch.equal(quantized.decode(decoded[linear].dtype), decoded[linear])
    assert close(logits(ours), before, tolerance)


def test_a_plain_model_is_read_as_it_is(wide: Path) -> None:
    assert torch.equal(logits(laconic.load(wide)), logits(original(wide)))


def test_a_native_artifact_saved_by_transformers_is_still_the_same(wide: Path, tmp_path: Path) -> None:
    artifact = press(wide, tmp_path / "artifact", rtn("W6A6"))
    opened = AutoModelForCausalLM.from_pretrained(artifact.path)
    opened.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved").keys() == tensors(artifact.path).keys()
    assert torch.equal(logits(laconic.load(tmp_path / "saved")), logits(laconic.load(artifact.path)))


def test_what_only_reads_does_not_load_what_compresses() -> None:
    """So that an engine's environment needs no more than the reading takes."""
    code = "import sys, laconic, laconic.runtime.products; print(*(m for m in sys.modules if m.startswith('laconic.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "laconic.runtime.products" in loaded
    assert not [m for m in loaded if m.startswith(("laconic.walk", "laconic.pipeline.compression", "laconic.methods"))]
