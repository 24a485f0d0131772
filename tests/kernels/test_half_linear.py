"""A linear in half precision, computed in float32, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.kernels import half_linear as of
from laconic.kernels.half_linear import half_linear

SHAPES = [(200, 96, 160), (1500, 64, 33), (129, 1, 1), (4, 64, 32)]


@pytest.fixture(autouse=True, params=[False, True], ids=["widened", "native"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of, "has_half_units", lambda: request.param)


def drawn(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(tokens)
    x, W, b = (torch.randn(*s, generator=g).to(dtype) for s in ((2, tokens, inputs), (outputs, inputs), (outputs,)))
    return x, W, b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_one_rounding_away_from_exact(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    x, W, b = drawn(*shape, dtype)
    bias = b if biased else None
    y = half_linear(x, W, bias)
    exact = F.linear(x.double(), W.double(), None if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == exact.shape
    # Half a step of the result's dtype, and what float32 sums lose.
    sums = x.double().abs() @ W.double().abs().T
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5 * sums + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, int, int]) -> None:
    x, W, b = drawn(*shape, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    exact = [t.double().requires_grad_() for t in (x, W, b)]
    weighting = torch.randn(2, shape[0], shape[2], generator=torch.Generator().manual_seed(1)).bfloat16()
    (half_linear(*leaves) * weighting).sum().backward()
    (F.linear(*exact) * weighting.double()).sum().backward()
    for got, expected in zip(leaves, exact, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(
            got.grad.double(), expected.grad, rtol=2e-2, atol=2e-2 * float(expected.grad.abs().max())
        )


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, W, _ = drawn(200, 16, 16, torch.bfloat16)
    W.requires_grad_()
    half_linear(x, W).sum().backward()
    assert W.grad is not None
    assert x.grad is None
