"""What every format promises of its grid, against the plain definition in float64 and against compressed-tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, FINITE, FORMATS, ROW, TILINGS, matrices, name
from torch import Tensor

from laconic.formats import Format, Params
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import Fp4, MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=name)


def all_codes(fmt: Format) -> Tensor:
    if isinstance(fmt, IntAffine):
        return torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.int8)
    if isinstance(fmt, Fp4):
        return torch.arange(16, dtype=torch.uint8)
    floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return floats[floats.float().isfinite()]


def grid(fmt: Format, params: Params) -> Tensor:
    """Every value that a row may take, by the definition w = scale * (code - zero_point): (rows, codes) float64."""
    zero_point = params.get("zero_point", torch.zeros(1, 1)).double()
    if isinstance(fmt, Fp4):
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        return scale(fmt, params) * torch.cat([values, -values])
    return scale(fmt, params) * (all_codes(fmt).double() - zero_point)


def scale(fmt: Format, params: Params) -> Tensor:
    """What a code's value is multiplied by: (rows, 1) float64."""
    stored = params["scale"].double()
    if isinstance(fmt, MxFp4):
        return 2 ** (stored - 127)
    return stored / params.get("global_scale", torch.ones(1)).double()


def values(fmt: Format, w: Tensor, params: Params) -> Tensor:
    return fmt.decode(fmt.encode(w, params), params)


@every_format
@given(dtype=DTYPES, w=matrices())
def test_every_value_goes_to_the_nearest_point_of_the_grid(fmt: Format, dtype: torch.dtype, w: Tensor) -> None:
    params = fmt.fit(w, dtype)
    least = (w.double()[..., None] - grid(fmt, params)[:, None]).abs().amin(-1)
    slack = 1e-6 * (w.abs() + scale(fmt, params).abs() * 2**fmt.num_bits)
    assert bool(((w - values(fmt, w, params)).abs() <= least + slack).all())


@every_format
@given(dtype=DTYPES, w=matrices())
def test_inside_the_range_the_error_is_at_most_half_a_step(fmt: Format, dtype: torch.dtype, w: Tensor) -> None:
    params = fmt.fit(w, dtype)
    points = grid(fmt, params)
    inside = (w >= points.amin(-1, keepdim=True)) & (w <= points.amax(-1, keepdim=True))
    steps = points.sort(-1).values.diff(dim=-1).amax(-1, keepdim=True)
    error = (w.double() - values(fmt, w, params)).abs()
    assert bool((error <= steps * (0.5 + 1e-5))[inside].all())


@every_format
@given(w=matrices())
def test_a_min_max_grid_reaches_to_the_ends_of_the_range(fmt: Format, w: Tensor) -> None:
    params = fmt.fit(w)
    error = (w - values(fmt, w, params)).abs()
    # A signed grid ends a step short of the end that reaches less far.
    step = scale(fmt, params).abs() * {IntAffine: 2 if getattr(fmt, "signed_scale", False) else 1, Fp8: 32}.get(
        type(fmt), 2
    )
    # Under a scale of the whole tensor, those of rows much smaller than its largest value are coarse.
    slack = 1e-5 * (w.abs().amax() if isinstance(fmt, NvFp4) else w.abs())
    assert bool((error <= step * (0.5 + 1e-5) + slack).all())


@every_format
@given(dtype=DTYPES, w=matrices(FINITE))
def test_zero_is_exact_and_nothing_is_nan_whatever_the_size(fmt: Format, dtype: torch.dtype, w: Tensor) -> None:
    params = fmt.fit(w, dtype)
    assert params["scale"].dtype == {MxFp4: torch.uint8, NvFp4: torch.float8_e4m3fn}.get(type(fmt), dtype)
    assert bool((scale(fmt, params) != 0).all())
    assert all(p.float().isfinite().all() for p in params.values())
    codes = fmt.encode(w, params)
    assert codes.dtype == fmt.code_dtype
    assert torch.isin(codes.float(), all_codes(fmt).float()).all()
    assert not fmt.decode(codes, params).isnan().any()
    assert bool((values(fmt, torch.zeros_like(w), params) == 0).all())


@every_format
@given(dtype=DTYPES, w=matrices())
def test_a_point_of_the_grid_stays_where_it_is(fmt: Format, dtype: torch.dtype, w: Tensor) -> None:
    params = fmt.fit(w, dtype)
    codes = all_codes(fmt).repeat(w.shape[0], 1)
    again = fmt.encode(fmt.decode(codes, params), params)
    assert torch.equal(again.float(), codes.float())


@every_format
@given(dtype=DTYPES)
def test_a_row_of_zeros_has_scale_one_and_stays_zero(fmt: Format, dtype: torch.dtype) -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    params = fmt.fit(w, dtype)
    assert scale(fmt, params)[0] * params.get("global_scale", torch.ones(1)) == 1
    assert torch.equal(values(fmt, w, params)[0], w[0])


@every_format
@pytest.mark.parametrize("constant", [3.7, -0.02, 1e30, -1e-30, 1e-42])
def test_a_constant_row_is_kept_to_half_a_step(fmt: Format, constant: float) -> None:
    w = torch.full((1, 8), constant)
    params = fmt.fit(w)
    # A power of two leaves it between 3.5 and 7, and past 6 it is cut off.
    allowed = 1.01 if isinstance(fmt, MxFp4) else 0.51
    assert bool(((w - values(fmt, w, params)).abs() <= scale(fmt, params).abs() * allowed).all())


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.symmetric], ids=name)
@given(w=matrices())
def test_an_asymmetric_grid_ends_where_the_values_end(fmt: IntAffine, w: Tensor) -> None:
    params = fmt.fit(w)
    points = grid(fmt, params)
    lo, hi = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    slack = params["scale"] * 0.51
    reached = ((points[:, :1] - lo).abs() <= slack) & ((points[:, -1:] - hi).abs() <= slack)
    assert bool(reached[hi - lo > 1e-30].all())


@pytest.mark.parametrize("tiling", [t for t in TILINGS if t.strategy != "token"], ids=name)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if not getattr(f, "narrow", isinstance(f, Fp4))], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_values_are_those_of_compressed_tensors(fmt: Format, tiling: Tiling, dtype: torch.dtype) -> None:
    fmt = replace(fmt, tiling=tiling)
    w = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w, dtype)
    args = QuantizationArgs(
        num_bits=fmt.num_bits,
        type="int" if isinstance(fmt, IntAffine) else "float",
        symmetric=fmt.symmetric,
        strategy=tiling.strategy,
        group_size=tiling.group_size,
        block_structure=tiling.block_structure and list(tiling.block_structure),
    )
    theirs = {"scale": params["scale"].float(), "zero_point": params.get("zero_point"), "args": args}
    codes = fmt.encode(w, params)
    assert torch.equal(codes.float(), their_quantize(w, **theirs, dtype=fmt.code_dtype).float())
    assert torch.equal(fmt.decode(codes, params), dequantize(codes, **theirs))


@given(w=matrices(FINITE))
def test_fp8_codes_are_what_torch_casts_to(w: Tensor) -> None:
    fmt = Fp8(ROW)
    params = fmt.fit(w)
    scaled = (w / params["scale"]).clamp(-448, 448)
    assert torch.equal(fmt.encode(w, params).view(torch.uint8), scaled.to(torch.float8_e4m3fn).view(torch.uint8))


@given(absmax=st.floats(2.0**-10, 1e4, width=32))
def test_the_largest_value_of_a_row_is_the_largest_fp8(absmax: float) -> None:
    w = torch.tensor([[absmax, -absmax / 3]])
    assert Fp8(ROW).encode(w, Fp8(ROW).fit(w))[0, 0].float() == 448


@pytest.mark.parametrize("num_bits", [0, 1, 9, 16])
def test_integers_have_two_to_eight_bits(num_bits: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {num_bits}"):
        IntAffine(num_bits, True, ROW)
