"""QLinear: inputs rounded and weights decoded as the scheme says, multiplied as float64 would."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import laconic
from artifacts import quantized_linears, with_decoded_weights
from laconic.formats import quantize
from laconic.formats.schemes import PRESETS, Scheme, scheme
from laconic.runtime.linear import QLinear
from laconic.runtime.products import round_activations

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])

# The varied schemes are those whose activations are scaled by calibration.
SCHEMES = (*PRESETS.values(), scheme("W8A8", dynamic=False), scheme("W6A6", dynamic=False))
every_scheme = pytest.mark.parametrize("kept", SCHEMES, ids=lambda s: f"{s.name}-{_timing(s)}")
rounding_schemes = pytest.mark.parametrize(
    "kept", [s for s in SCHEMES if s.input_activations], ids=lambda s: f"{s.name}-{_timing(s)}"
)


def _timing(kept: Scheme) -> str:
    acts = kept.input_activations
    return "none" if acts is None else "dynamic" if acts.dynamic else "static"


def calibration(kept: Scheme) -> dict[str, Tensor]:
    """Made-up parameters of the inputs, where a scheme does not take them from each input itself."""
    return {False: {"scale": torch.tensor([0.013])}, "local": {"global_scale": torch.tensor([200.0])}, True: {}}[
        kept.input_activations.dynamic
    ]


def activations(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    x[..., ::50] *= 10
    return x


def nearest(values: Tensor, scale: float, num_bits: int | Tensor) -> Tensor:
    """float64 values on the grid of a scale: integers as engines clamp them, or the values of a float."""
    if isinstance(num_bits, Tensor):
        points = num_bits * scale
        return points[(values[:, None] - points).abs().argmin(-1)]
    top = 2 ** (num_bits - 1) - 1
    return (values / scale).round().clamp(-top - 1, top) * scale


def rounded_by_hand(x: Tensor, kept: Scheme, calibrated: float | None) -> Tensor:
    """Token after token, group after group, in float64."""
    acts = kept.input_activations
    num_bits = E4M3 if kept.name.startswith("FP8") else E2M1 if "FP4" in kept.name else acts.format.num_bits
    largest = float(num_bits.max()) if isinstance(num_bits, Tensor) else 2.0 ** (num_bits - 1) - 1
    out = torch.empty_like(x, dtype=torch.float64)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], acts.format.tiling.group_size or x.shape[1]):
            part = x[token, start : start + (acts.format.tiling.group_size or x.shape[1])].double()
            scale = calibrated if acts.dynamic is False else float(part.abs().max()) / largest
            if kept.name == "NVFP4":
                scale = float(E4M3[(E4M3 - scale * calibrated).abs().argmin()]) / calibrated
            elif kept.name == "MXFP4":
                # The smallest power of two that leaves no more than what rounds to 6.
                scale = 2.0 ** (math.floor(math.log2(scale * 6 / 7)) + 1)
            out[token, start : start + len(part)] = nearest(part, scale, num_bits)
    return out


@rounding_schemes
def test_activations_are_rounded_as_the_definition_says(kept: Scheme) -> None:
    x = activations(6, 256)
    calibrated = calibration(kept)
    expected = rounded_by_hand(x, kept, *([float(p) for p in calibrated.values()] or [None]))
    rounded = round_activations(x.view(2, 3, 256), kept.input_activations, calibrated)
    torch.testing.assert_close(rounded.double(), expected.view(2, 3, 256), rtol=1e-6, atol=1e-7)


@rounding_schemes
def test_a_token_of_zeros_stays_zero(kept: Scheme) -> None:
    assert bool((round_activations(torch.zeros(1, 256), kept.input_activations, calibration(kept)) == 0).all())


@rounding_schemes
def test_a_token_is_rounded_with_no_regard_for_its_neighbours(kept: Scheme) -> None:
    x, calibrated = activations(4, 256), calibration(kept)
    alone = torch.cat([round_activations(row[None], kept.input_activations, calibrated) for row in x])
    assert torch.equal(round_activations(x, kept.input_activations, calibrated), alone)


def qlinear(kept: Scheme, *, bias: bool, dtype: torch.dtype) -> QLinear:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(200, 256, generator=generator)
    linear = QLinear(256, 200, bias=bias, scheme=kept, dtype=dtype)
    stored = quantize(kept.weights, w, kept.weights.fit(w, dtype)).to_tensors()
    if bias:
        stored["bias"] = torch.randn(200, generator=generator).to(dtype)
    if kept.input_activations:
        end = torch.tensor(6.0)
        calibrated = kept.input_activations.calibrate(-end, end, dtype)
        stored |= {f"input_{n}": p for n, p in calibrated.items()}
    assert {n: (p.shape, p.dtype) for n, p in linear.named_parameters()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }
    for name, tensor in stored.items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    return linear


@every_scheme
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("unpacked", [True, False], ids=["unpacked", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_forward_is_the_product_of_what_both_sides_stand_for(
    kept: Scheme, bias: bool, unpacked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    linear = qlinear(kept, bias=bias, dtype=dtype)
    weight = linear.decode(torch.float32)
    if unpacked:
        linear.unpack()
    x = activations(2, 3, 256).to(dtype)
    acts = kept.input_activations
    calibrated = {n: getattr(linear, f"input_{n}") for n in linear.calibrated}
    seen = round_activations(x, acts, calibrated) if acts else x
    expected = seen.double() @ weight.double().T + (linear.bias.double() if bias else 0)
    out = linear(x)
    assert out.dtype == dtype
    assert float((out.double() - expected).norm() / expected.norm()) < tolerance


@every_scheme
def test_unpacking_changes_nothing_but_the_time_it_takes(kept: Scheme) -> None:
    linear = qlinear(kept, bias=True, dtype=torch.bfloat16)
    x = activations(5, 256).bfloat16()
    packed = linear(x)
    linear.unpack()
    assert torch.equal(linear(x), packed)


def test_a_model_moves_and_changes_its_dtype_with_its_decoded_weights(llama: Path, tmp_path: Path) -> None:
    for preset in ("W4A16", "FP8_DYNAMIC", "NVFP4A16", "W6A6"):
        stage = {"method": "rtn", "scheme": preset} | ({"group_size": 32} if preset == "W4A16" else {})
        artifact = laconic.compress(str(llama), {"stages": [stage]}, tmp_path / preset)
        model = laconic.load(artifact.path)
        codes = {n: t.clone() for n, t in model.named_parameters() if ".weight" in n and "norm" not in n}
        expected = with_decoded_weights(llama, artifact.path)
        ids = torch.arange(3, 40)[None]
        halved = model.half()
        assert {t.device.type for t in (*halved.parameters(), *halved.buffers())} == {"cpu"}
        with torch.no_grad():
            ours, theirs = halved(input_ids=ids).logits, expected.half()(input_ids=ids).logits
        assert ours.dtype == torch.float16
        assert ours.isfinite().all()
        if preset.endswith("A16"):
            # The reference rounds its weights to bfloat16 first.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)
        for name, linear in quantized_linears(halved).items():
            assert all(torch.equal(getattr(linear, n), codes[f"{name}.{n}"]) for n in linear.names), name
            moved = linear.to("meta")
            assert all(t.is_meta for t in (*moved.parameters(), *moved.buffers()))
