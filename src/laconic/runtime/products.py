"""What a quantized linear computes: two real products where there is integer arithmetic, otherwise a simulated one.

LLM.int8 (arXiv 2208.07339), section 3: the outlier columns of the input meet their weights in 16 bit; all others are
rounded to int8 under one scale a token (which no outlier stretches), multiplied into int32, and scaled out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.formats import Outliers, Params
from laconic.formats.schemes import Activations
from laconic.kernels.half_linear import half_linear

# Sums of so many products of int8 stay below 2^24, where float32 counts exactly.
_EXACT = 1024

# Rows of an integer product made at once on a CPU: few enough that what lies between codes and result stays in cache,
# and that memory holds no float32 copy of the whole.
_ROWS = 512


def round_activations(x: Tensor, acts: Activations, calibrated: Params, exempt: Tensor | None = None) -> Tensor:
    """x (..., in) rounded to the activation format and back, in float32 (simulated). calibrated: the parameters that do
    not come from x (`Activations.calibrate`). exempt: (k,) columns that are left as they are, and have no say in the
    scale."""
    flat = x.reshape(-1, x.shape[-1]).float()
    rest = _without(flat, exempt)
    params = _activation_params(rest, acts, calibrated)
    rounded = acts.format.decode(acts.format.encode(rest, params), params)
    if exempt is not None:
        rounded[:, exempt.long()] = flat[:, exempt.long()]
    return rounded.view(x.shape)


def simulated_linear(
    x: Tensor,
    weight: Tensor,
    acts: Activations | None,
    calibrated: Params,
    exempt: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x (..., in) by a decoded weight (out, in), in float32 where activations are rounded. Returns: in x's dtype."""
    if acts is None:
        return half_linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    rounded = round_activations(x, acts, calibrated, exempt)
    return F.linear(rounded, weight.float(), None if bias is None else bias.float()).to(x.dtype)


def integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    acts: Activations,
    calibrated: Params,
    outliers: Outliers | None,
    bias: Tensor | None,
) -> Tensor:
    """x (..., in) by int8 codes (out, in), and by the outlier columns in a product of their own.

    scale: of the weight, (1,) or (out, 1). Returns: (..., out) in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    # A scale is of a token or of all inputs, so that rows need not know of each other.
    runs = flat.split(max(1, flat.shape[0]) if x.is_cuda else _ROWS)
    y = [_integer_rows(rows, codes, scale, acts, calibrated, outliers, bias).to(x.dtype) for rows in runs]
    return torch.cat(y).view(*x.shape[:-1], codes.shape[0])


def _integer_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    acts: Activations,
    calibrated: Params,
    outliers: Outliers | None,
    bias: Tensor | None,
) -> Tensor:
    """`integer_linear` of x (tokens, in), in float32."""
    rest = _without(x.float(), None if outliers is None else outliers.indices)
    params = _activation_params(rest, acts, calibrated)
    # What codes stand in outlier columns does not count: the input is zero there.
    y = int8_product(acts.format.encode(rest, params), codes).float()
    y.mul_(params["scale"].float()).mul_(scale.float().reshape(1, -1))
    if outliers is not None:
        y.add_(_wide_product(x[:, outliers.indices.long()], outliers.weight.to(x.dtype)))
    return y if bias is None else y.add_(bias.float())


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) int8 by b (n, k) int8: (m, n) int32, exact."""
    # torch's product on a CPU leaves memory as it was where there is one column to sum over.
    if a.device.type == "cpu" and a.shape[1] > 1:
        return torch._int_mm(a, b.T)
    if a.is_cuda and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        # cuBLAS asks for more than 16 rows.
        m = a.shape[0]
        return torch._int_mm(F.pad(a, (0, 0, 0, max(0, 32 - m))), b.T)[:m]
    return exact_float_product(a, b)


def exact_float_product(a: Tensor, b: Tensor) -> Tensor:
    """The same in float32, where no integer product is at hand: in runs short enough to be exact."""
    y = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for run_a, run_b in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        y += (run_a.float() @ run_b.float().T).to(torch.int32)
    return y


def _wide_product(x: Tensor, w: Tensor) -> Tensor:
    """x (m, k) by w (n, k), both in 16 bit, added up in float32."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T


def _activation_params(x: Tensor, acts: Activations, calibrated: Params) -> Params:
    if acts.dynamic:
        return acts.format.fit(x, shared=calibrated)
    return {name: p.float() for name, p in calibrated.items()}


def _without(x: Tensor, columns: Tensor | None) -> Tensor:
    return x if columns is None else x.index_fill(1, columns.long(), 0)
