"""NF4 against the paper's own values, and a plain search for the nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.methods.lora.nf4 import VALUES, quantize_nf4

# arXiv 2305.14314, appendix E.
PAPER = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""


def test_the_values_are_the_papers() -> None:
    assert VALUES.tolist() == pytest.approx([float(v) for v in PAPER.split()], abs=2e-7)


@given(out=st.integers(1, 9), inputs=st.integers(1, 200), seed=st.integers(0, 99), zeros=st.floats(0, 1))
def test_every_weight_goes_to_the_nearest_value_of_its_block(out: int, inputs: int, seed: int, zeros: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inputs, generator=generator) * (torch.rand(out, inputs, generator=generator) >= zeros)
    held = quantize_nf4(W)
    decoded = held.decode(torch.float32)
    assert decoded.shape == W.shape
    assert (decoded[W == 0] == 0).all()
    kept = ((held.scales.float() * held.coarse[:, None]).flatten() + held.mean).repeat_interleave(64)[: W.numel()]
    choices = kept[:, None] * VALUES
    nearest = (choices - W.flatten()[:, None]).abs().amin(1)
    assert torch.allclose((decoded - W).flatten().abs(), nearest, atol=1e-6)


def test_it_takes_little_more_than_four_bits_and_costs_little() -> None:
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    held = quantize_nf4(W)
    assert 8 * held.nbytes / W.numel() == pytest.approx(4.127, abs=0.001)
    # The scales in FP8 cost next to nothing: with exact ones the same values give nearly the same error.
    peak = W.view(-1, 64).abs().amax(1, keepdim=True)
    exact = VALUES[(W.view(-1, 64, 1) / peak[:, None] - VALUES).abs().argmin(-1)] * peak
    errors = [float((W - w.view_as(W)).square().mean() / W.square().mean()) for w in (held.decode(W.dtype), exact)]
    assert errors[0] < 1.02 * errors[1] < 0.011


def test_a_matrix_of_zeros_stays_one() -> None:
    assert (quantize_nf4(torch.zeros(3, 100)).decode(torch.bfloat16) == 0).all()
