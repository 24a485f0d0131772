"""Two products: int8 by int8 to the last unit, outlier columns beside it, together what float64 says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from laconic.formats import Outliers, Quantized, quantize
from laconic.formats.schemes import PRESETS, scheme
from laconic.runtime.linear import QLinear
from laconic.runtime.products import exact_float_product, int8_product, round_activations

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOUD = [3, 77, 130, 255]


def codes(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """Of the parameters."""
    return str(request.param if request.param == "cpu" else request.getfixturevalue("cuda"))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("product", [int8_product, exact_float_product])
@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.one_of(st.integers(1, 64), st.sampled_from([1024, 1025, 3000])))
def test_the_product_of_integers_is_exact(product: Any, device: str, m: int, n: int, k: int) -> None:
    a, b = codes(m, k, m), codes(n, k, n)
    assert torch.equal(product(a.to(device), b.to(device)).cpu().long(), a.long() @ b.long().T)


def test_the_largest_sums_do_not_lose_a_unit() -> None:
    a, b = torch.full((2, 5001), 127, dtype=torch.int8), torch.full((3, 5001), -128, dtype=torch.int8)
    assert (exact_float_product(a, b) == -127 * 128 * 5001).all()


def loud_input(dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(3))
    x[..., LOUD] *= 50
    return x.to(dtype)


def qlinear(dtype: torch.dtype, *, loud: list[int], **varied: Any) -> QLinear:
    kept = replace(scheme("W8A8", **varied), outlier_columns=len(loud))
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(200, 256, generator=generator)
    columns = torch.tensor(loud, dtype=torch.int64)
    q = quantize(kept.weights, w.index_fill(1, columns, 0), kept.weights.fit(w.index_fill(1, columns, 0), dtype))
    if loud:
        q = replace(q, outliers=Outliers(columns.to(torch.int32), w[:, columns].to(dtype)))
    linear = QLinear(256, 200, bias=True, scheme=kept, dtype=dtype)
    stored = q.to_tensors() | {"bias": torch.randn(200, generator=generator).to(dtype)}
    if linear.calibrated:
        stored["input_scale"] = torch.tensor([0.03], dtype=dtype)
    for name, tensor in stored.items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    return linear


def by_hand(x: Tensor, linear: QLinear, loud: list[int]) -> Tensor:
    """Token by token in float64: the quiet columns on 127 steps to their largest, the loud ones as they are."""
    weight, rows = linear.decode(torch.float32).double(), []
    for token in x.flatten(0, -2).double():
        quiet = token.clone()
        quiet[loud] = 0
        scale = float(quiet.abs().max()) / 127 if not linear.calibrated else float(linear.input_scale)
        seen = (quiet / scale).round().clamp(-128, 127) * scale
        seen[loud] = token[loud]
        rows.append(weight @ seen + linear.bias.double())
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("varied", [{}, {"dynamic": False}, {"strategy": "tensor"}], ids=str)
@pytest.mark.parametrize("loud", [LOUD, []], ids=["outliers", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_two_products_are_one_by_the_decoded_weight(
    device: str, dtype: torch.dtype, tolerance: float, loud: list[int], varied: dict[str, Any]
) -> None:
    linear, x = qlinear(dtype, loud=loud, **varied), loud_input(dtype)
    expected = by_hand(x, linear, loud)
    linear.to(device).unpack()
    assert linear.dense is None
    out = linear(x.to(device))
    assert out.dtype == dtype
    assert float((out.cpu().double() - expected).norm() / expected.norm()) < tolerance


def test_what_codes_stand_in_outlier_columns_does_not_count() -> None:
    linear, x = qlinear(torch.float32, loud=LOUD), loud_input(torch.float32)
    before = linear(x)
    linear.weight.data[:, LOUD] = 99
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("name", ["W6A6", "FP8_BLOCK", "FP8_DYNAMIC"])
def test_exempt_columns_stay_and_have_no_say_in_the_scale(name: str) -> None:
    acts, x = PRESETS[name].input_activations, loud_input(torch.float32)
    columns = torch.tensor(LOUD, dtype=torch.int32)
    quiet = [i for i in range(256) if i not in LOUD]
    rounded = round_activations(x, acts, {}, columns)
    assert torch.equal(rounded[..., LOUD], x[..., LOUD])
    silenced = x.clone()
    silenced[..., LOUD] = 0
    assert torch.equal(rounded[..., quiet], round_activations(silenced, acts, None)[..., quiet])


def test_simulated_schemes_keep_outlier_columns_too() -> None:
    kept = replace(PRESETS["W6A6"], outlier_columns=len(LOUD))
    w, x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), loud_input(torch.float32)
    columns = torch.tensor(LOUD, dtype=torch.int32)
    q: Quantized = replace(
        quantize(kept.weights, w, kept.weights.fit(w)), outliers=Outliers(columns, w[:, LOUD].contiguous())
    )
    linear = QLinear(256, 64, bias=False, scheme=kept, dtype=torch.float32)
    for name, tensor in q.to_tensors().items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    seen = round_activations(x, kept.input_activations, {}, columns)
    expected = seen.double() @ q.decode().double().T
    for _ in range(2):
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)
        linear.unpack()


def test_what_lies_beyond_a_calibrated_range_is_clamped_to_all_codes_there_are() -> None:
    acts = scheme("W8A8", dynamic=False).input_activations
    assert acts is not None
    calibrated = acts.calibrate(torch.tensor(-1.0), torch.tensor(0.5), torch.float32)
    assert float(calibrated["scale"]) == pytest.approx(1 / 127)
    x = torch.tensor([[-9.0, -1.0, 0.5, 9.0]])
    steps = round_activations(x, acts, calibrated) * 127
    # As vLLM clamps them: its static int8 reaches -128.
    assert steps.tolist()[0] == pytest.approx([-128, -127, 64, 127])
