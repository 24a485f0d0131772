"""Adapters against peft and plain float64; masks to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from artifacts import logits, original, tokens
from laconic.methods.lora.adapters import AdaptedLinear, Nf4Linear, add_adapters, merge_adapters

peft = pytest.importorskip("peft")


def random(*shape: int, seed: int, zeros: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn * (torch.rand(shape, generator=generator) >= zeros)).to(dtype)


def a_linear(out: int, inputs: int, *, seed: int, zeros: float, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(random(out, inputs, seed=seed, zeros=zeros))
    return linear


def an_adapter(base: nn.Module, *, rank: int = 3, masked: bool = True, seed: int = 1) -> AdaptedLinear:
    adapted = AdaptedLinear(base.requires_grad_(False), rank, 6, 0.0, masked=masked)
    with torch.no_grad():
        adapted.lora_A.copy_(random(*adapted.lora_A.shape, seed=seed))
        adapted.lora_B.copy_(random(*adapted.lora_B.shape, seed=seed + 1))
    return adapted


@given(
    out=st.integers(1, 12),
    inputs=st.integers(1, 12),
    seed=st.integers(0, 50),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    nf4=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_plain_product(
    out: int, inputs: int, seed: int, zeros: float, nf4: bool
) -> None:
    linear = a_linear(out, inputs, seed=seed, zeros=zeros)
    adapted = an_adapter(linear)
    W = linear.weight.detach().double()
    mask = W != 0
    if nf4:
        adapted.base = Nf4Linear(linear)
        W = adapted.base.decode(torch.float64)
    assert adapted.mask().equal(mask)
    x = random(2, 5, inputs, seed=seed + 9, dtype=torch.float32).requires_grad_()
    y = adapted(x)
    weights = random(*y.shape, seed=seed + 10)
    (y * weights).sum().backward()

    X, A, B = (t.detach().double().requires_grad_() for t in (x, adapted.lora_A, adapted.lora_B))
    expected = X @ (W + 2.0 * mask * (B @ A)).T + linear.bias.detach().double()
    (expected * weights).sum().backward()
    close(y, expected)
    for found, known in ((x, X), (adapted.lora_A, A), (adapted.lora_B, B)):
        close(found.grad, known.grad)


def close(found: Any, expected: Any) -> None:
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max() + 1e-9))


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_touches_the_adapter_alone(masked: bool) -> None:
    linear = a_linear(8, 16, seed=0, zeros=0.5 if masked else 0.0)
    adapted = an_adapter(linear)
    adapted.dropout, adapted.training = 0.5, True
    x = random(4, 16, seed=5, dtype=torch.float32)
    torch.manual_seed(3)
    y = adapted(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    change = 2.0 * adapted.mask() * (adapted.lora_B @ adapted.lora_A)
    close(y, (linear(x) + dropped @ change.T).detach().double())


def test_without_masks_it_is_pefts(llama: Path) -> None:
    names = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    theirs = peft.get_peft_model(original(llama, torch.float32), config)
    ours = original(llama, torch.float32)
    linears = [n for n, _ in ours.named_modules() if n.rpartition(".")[2] in names]
    made = add_adapters(ours, linears, rank=4, alpha=8, dropout=0, masked=True, generator=torch.Generator())
    with torch.no_grad():
        for name, adapted in made.items():
            assert adapted.packed_mask is None
            assert not adapted.lora_B.any()
            adapted.lora_B.normal_()
            layer = theirs.get_submodule(f"base_model.model.{name}")
            # Drawn alike: uniform, to the same bound.
            assert layer.lora_A.default.weight.abs().max() == pytest.approx(float(adapted.lora_A.abs().max()), rel=0.05)
            layer.lora_A.default.weight.copy_(adapted.lora_A)
            layer.lora_B.default.weight.copy_(adapted.lora_B)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


@given(zeros=st.floats(0, 1), seed=st.integers(0, 99), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_merged_zeros_stay_zero_and_the_rest_is_what_was_trained(zeros: float, seed: int, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": a_linear(9, 7, seed=seed, zeros=zeros, bias=False)}).to(dtype)
    W = model["a"].weight.detach().clone()
    adapted = an_adapter(a_linear(9, 7, seed=seed, zeros=zeros, bias=False).to(dtype))
    state = {"a.lora_A": adapted.lora_A.detach(), "a.lora_B": adapted.lora_B.detach()}
    merge_adapters(model, state, adapted.scale)
    found = model["a"].weight.detach()
    assert (found[W == 0].view(torch.int16 if dtype == torch.bfloat16 else torch.int32) == 0).all()
    # What a unit vector is multiplied with is the weight that was trained; through a mask, to the last bit.
    trained = adapted(torch.eye(7, dtype=dtype)).T.detach()
    exact = adapted.packed_mask is not None and dtype == torch.bfloat16
    assert torch.equal(found, trained) if exact else (found - trained).abs().max() <= 0.03 * found.abs().max()


def test_a_merged_model_puts_out_what_the_adapted_one_did(llama: Path) -> None:
    ours, plain = original(llama, torch.float32), original(llama, torch.float32)
    names = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for model in (ours, plain):
        for name in names[::2]:
            weight = model.get_submodule(name).weight.data
            weight[weight.abs() < weight.abs().median()] = 0
    made = add_adapters(ours, names, rank=4, alpha=8, dropout=0, masked=True, generator=torch.Generator())
    state = {}
    for i, (name, adapted) in enumerate(made.items()):
        assert (adapted.packed_mask is None) == (i % 2 == 1)
        adapted.lora_B.data.normal_(std=0.05)
        state |= {f"{name}.lora_A": adapted.lora_A, f"{name}.lora_B": adapted.lora_B}
    ids = tokens()
    before = logits(plain, ids)
    merge_adapters(plain, state, 2.0)
    assert not torch.allclose(logits(plain, ids), before, atol=0.1)
    assert torch.allclose(logits(plain, ids), logits(ours, ids), atol=1e-3)


def test_an_nf4_linear_keeps_nothing_dense(llama: Path) -> None:
    linear = a_linear(64, 128, seed=0, zeros=0)
    held = Nf4Linear(linear)
    assert sum(b.nbytes for b in held.buffers()) < 64 * 128 * 0.75
    kept: list[int] = []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        held(x).sum().backward()
    assert max(kept, default=0) < 64 * 128
    assert torch.allclose(x.grad, held.decode(torch.float32).sum(0).expand(3, -1), atol=1e-4)
