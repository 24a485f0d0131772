"""A linear in half precision on a CPU, in the arithmetic that the processor is fastest at.

Products of two half-precision numbers are exact in float32, and both ways add them up in float32 and round once: the
results differ by the order of a sum. Where there are no matrix units for half precision, float32 takes two thirds of
the time.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of the input, and numbers of the weight, that are widened at once: what lies between two half-precision tensors
# stays small.
_ROWS, _WIDENED = 1024, 1 << 22
# With fewer rows, widening the weight costs more than the product gains.
_FEW = 128


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) by weight (out, in), plus bias (out,), as `torch.nn.functional.linear`, with gradients."""
    half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
    if not half or x.device.type != "cpu" or x.numel() < _FEW * x.shape[-1] or has_half_units():
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Widened.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        y = _product(flat, weight.T, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@cache
def has_half_units() -> bool:
    """Whether this processor multiplies half precision faster than float32.

    Told by what it is rather than by trying, so that a run that goes on computes the same: matrix units (AMX), or
    the dot products of AMD's processors, which are twice as wide as float32's. Intel's are not (AVX-512 BF16 takes 1.6
    times as long as float32 on a Xeon). Other architectures are left to torch.
    """
    cpu = torch.cpu.get_capabilities()
    if cpu.get("architecture") != "x86_64":
        return True
    return bool(cpu.get("amx_tile") or (cpu.get("avx512_bf16") and _is_amd()))


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) by b (k, n), plus bias (n,), in a's dtype."""
    y = a.new_empty(a.shape[0], b.shape[1])
    for start in range(0, b.shape[1], columns := max(64, _WIDENED // b.shape[0])):
        some = slice(start, start + columns)
        wide, offset = b[:, some].float(), None if bias is None else bias[some].float()
        for rows, made in zip(a.split(_ROWS), y[:, some].split(_ROWS), strict=True):
            made.copy_(rows.float() @ wide if offset is None else torch.addmm(offset, rows.float(), wide))
    return y


class _Widened(torch.autograd.Function):
    """x (m, in) by weight (out, in), plus bias. What is kept for the way back stays in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        to_x = _product(grad, weight) if ctx.needs_input_grad[0] else None
        to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            total = torch.zeros(weight.shape)
            for rows, g in zip(x.split(_ROWS), grad.split(_ROWS), strict=True):
                total.addmm_(g.float().T, rows.float())
            to_weight = total.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum(0)
        return to_x, to_weight, to_bias
