"""MXFP4 and NVFP4: codes, scales and bytes are those of compressed-tensors, and of the definitions."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import FP4_E2M1_DATA, QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from matrices import FINITE, matrices
from torch import Tensor

from laconic.formats import Params, quantize
from laconic.formats.fp4 import Fp4, MxFp4, NvFp4, decode_e2m1, encode_e2m1, pack_fp4, unpack_fp4
from laconic.formats.schemes import PRESETS
from laconic.formats.tiling import Tiling
from laconic.runtime.products import round_activations

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
both = pytest.mark.parametrize("preset", ["MXFP4A16", "NVFP4A16"])


def test_codes_are_the_bits_of_the_values() -> None:
    assert decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == [*VALUES.tolist(), *(-VALUES).tolist()]


@given(w=matrices(st.floats(-8, 8, width=32)))
def test_a_value_goes_to_the_nearest_and_half_way_to_the_even_mantissa(w: Tensor) -> None:
    distance = (w.abs().clamp(max=6).double()[..., None] - VALUES).abs()
    near = distance == distance.amin(-1, keepdim=True)
    # Two candidates at most, neighbours: of them the code without its lowest bit, which is the mantissa.
    even = near & (torch.arange(8) % 2 == 0)
    expected = torch.where(near.sum(-1) == 1, near.int().argmax(-1), even.int().argmax(-1))
    assert torch.equal(encode_e2m1(w) & 7, expected.to(torch.uint8))
    assert torch.equal(encode_e2m1(w) > 7, torch.signbit(w))


def test_ties_fall_as_theirs_do() -> None:
    halves = torch.cat([(VALUES[1:] + VALUES[:-1]) / 2, torch.tensor([7.0, 100.0])]).float()
    x = torch.cat([torch.nextafter(halves, torch.tensor(0.0)), halves, torch.nextafter(halves, torch.tensor(9.0))])
    x = torch.cat([x, -x])
    assert torch.equal(decode_e2m1(encode_e2m1(x)), FP4_E2M1_DATA.cast_to_fp4(x.clone()))


@given(w=matrices(FINITE, multiple_of=2))
def test_rounding_keeps_order(w: Tensor) -> None:
    ascending = w.flatten().sort().values
    assert bool((decode_e2m1(encode_e2m1(ascending)).diff() >= 0).all())


@given(w=matrices(st.floats(-8, 8, width=32), multiple_of=2))
def test_bytes_are_theirs(w: Tensor) -> None:
    codes = encode_e2m1(w)
    packed = pack_fp4(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(decode_e2m1(codes)))
    assert torch.equal(unpack_fp4(packed), codes)
    assert torch.equal(unpack_fp4_from_uint8(packed, *w.shape, dtype=torch.float32), decode_e2m1(codes))


def weight(rows: int = 40, columns: int = 128) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]


def their_params(w: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """What compressed-tensors would fit."""
    tiles = w.unflatten(-1, (-1, args.group_size))
    lo, hi = tiles.amin(-1), tiles.amax(-1)
    globally = {"global_scale": generate_gparam(lo.amin(), hi.amax())} if args.strategy == "tensor_group" else {}
    scale, _ = calculate_qparams(lo, hi, args, **globally)
    return {"scale": scale} | globally


@both
def test_what_we_store_is_what_they_would(preset: str) -> None:
    kept, theirs, w = PRESETS[preset], preset_name_to_scheme(preset, ["Linear"]), weight()
    params = their_params(w, theirs.weights)
    compressor = BaseCompressor.get_value_from_registry(kept.storage)
    expected = compressor.compress({"weight": w, **{f"weight_{n}": p for n, p in params.items()}}, theirs)
    ours = quantize(kept.weights, w, kept.weights.fit(w)).to_tensors()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))


@both
def test_decoded_values_are_theirs(preset: str) -> None:
    kept, args, w = PRESETS[preset], preset_name_to_scheme(preset, ["Linear"]).weights, weight()
    params = their_params(w, args)
    expected = fake_quantize(w, params["scale"], None, args, params.get("global_scale"))
    assert torch.equal(quantize(kept.weights, w, kept.weights.fit(w)).decode(), expected)


@pytest.mark.parametrize("preset", ["MXFP4", "NVFP4"])
def test_activations_are_rounded_as_theirs_are(preset: str) -> None:
    acts, args, x = PRESETS[preset].input_activations, preset_name_to_scheme(preset, [""]).input_activations, weight()
    calibrated: Params = acts.calibrate(x.amin() / 2, x.amax() / 2, torch.bfloat16)
    scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), **calibrated)
    assert torch.equal(round_activations(x, acts, calibrated), fake_quantize(x, scale, None, args, **calibrated))


@given(w=matrices(st.floats(-1e4, 1e4, width=32)))
def test_a_power_of_two_is_the_smallest_that_cuts_nothing_off(w: Tensor) -> None:
    fmt = MxFp4()
    absmax = w.abs().amax(-1)
    exponent = fmt.from_range(w.amin(-1), w.amax(-1), torch.float32)["scale"].double() - 127
    scaled = absmax.double() / 2**exponent
    free = (absmax > 1e-30) & (absmax < 1e30)
    assert bool(((scaled >= 3.5) & (scaled < 7))[free].all())


@given(w=matrices(multiple_of=4))
def test_the_largest_value_of_a_tensor_is_kept_exactly(w: Tensor) -> None:
    fmt = NvFp4(tiling=Tiling("group", 4))
    largest = w.abs().amax()
    params = fmt.fit(w)
    assert params["global_scale"].shape == (1,)
    if largest > 1e-30:
        assert float(params["scale"].float().amax()) == 448
        torch.testing.assert_close(quantize(fmt, w, params).decode().abs().amax(), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", [MxFp4(), NvFp4()], ids=["mxfp4", "nvfp4"])
def test_rows_on_their_own_keep_the_scale_of_the_whole(fmt: Fp4) -> None:
    w = weight()
    whole = quantize(fmt, w, fmt.fit(w))
    part = whole.rows(8, 24)
    assert torch.equal(part.decode(), whole.decode()[8:24])
    assert part.params["scale"].shape == fmt.tiling.param_shape((16, 128))
    if isinstance(fmt, NvFp4):
        assert torch.equal(part.params["global_scale"], whole.params["global_scale"])
