"""Half-precision linear on a CPU, computed in float32 where the processor has no fast half-precision arithmetic.

Products of two half-precision numbers are exact in float32; both computations sum them in float32 and round once, so
that results differ only by the order of the sum. Without matrix units for half precision, float32 takes two thirds of
the time.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of the input, and elements of the weight, converted to float32 at once: bounds the memory of the float32 copies.
_ROWS, _ELEMENTS = 1024, 1 << 22
# With fewer rows than this, converting the weight costs more time than the float32 product saves.
_MIN_ROWS = 128


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear` in the fastest arithmetic of the processor, with gradients.

    Args:
        x: Input (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        x W^T + bias, (..., out), in the dtype of x.
    """
    half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
    if not half or x.device.type != "cpu" or x.numel() < _MIN_ROWS * x.shape[-1] or has_half_units():
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Float32Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        y = _product(flat, weight.T, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@cache
def has_half_units() -> bool:
    """Return whether this processor multiplies half precision faster than float32.

    Decided by the processor's features, not by a measurement, so that a resumed run computes the same: matrix units
    (AMX), or the bfloat16 dot products of AMD processors, which are twice as wide as those of float32. Intel's are not
    (AVX-512 BF16 takes 1.6 times as long as float32 on a Xeon). Other architectures are left to torch.
    """
    cpu = torch.cpu.get_capabilities()
    if cpu.get("architecture") != "x86_64":
        return True
    return bool(cpu.get("amx_tile") or (cpu.get("avx512_bf16") and _is_amd()))


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a b + bias in float32 and round to the dtype of a. a: (m, k), b: (k, n), bias: (n,)."""
    y = a.new_empty(a.shape[0], b.shape[1])
    for start in range(0, b.shape[1], columns := max(64, _ELEMENTS // b.shape[0])):
        chunk = slice(start, start + columns)
        b32, bias32 = b[:, chunk].float(), None if bias is None else bias[chunk].float()
        for rows, out in zip(a.split(_ROWS), y[:, chunk].split(_ROWS), strict=True):
            out.copy_(rows.float() @ b32 if bias32 is None else torch.addmm(bias32, rows.float(), b32))
    return y


class _Float32Linear(torch.autograd.Function):
    """x W^T + bias in float32, with x (m, in) and W (out, in); tensors saved for backward stay in half precision."""

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
