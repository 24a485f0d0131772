"""Products of a quantized linear: in integers where the scheme allows it, otherwise simulated in floating point.

LLM.int8 (arXiv 2208.07339), section 3: outlier columns of the input are multiplied with their weights in 16 bit. All
others are rounded to int8 under one scale per token, which no outlier widens, multiplied into int32, and scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.formats import Outliers, Params
from laconic.formats.rotation import rotate_channels
from laconic.formats.schemes import Activations
from laconic.kernels.half_linear import half_linear

# Sums of so many products of int8 stay below 2^24, up to which float32 is exact.
_EXACT_COLUMNS = 1024

# Rows of an integer product computed at once on a CPU: few enough that intermediate results stay in the cache, and that
# memory holds no float32 copy of the whole.
_ROWS = 512


def round_activations(
    x: Tensor, acts: Activations, calibrated: Params, exempt: Tensor | None = None, *, rotated: bool = False
) -> Tensor:
    """Round an input to the activation format and back (simulated).

    Args:
        x: (..., in), any float dtype.
        acts: Format of activations.
        calibrated: Parameters from calibration (`Activations.calibrate`).
        exempt: (k,) indices of columns that are not rounded and do not count for the scale; None for none.
        rotated: Whether x is rounded after a rotation of its channels, which is undone.

    Returns:
        (..., in) float32.
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    flat = rotate_channels(flat) if rotated else flat
    rest = _without(flat, exempt)
    params = _activation_params(rest, acts, calibrated)
    rounded = acts.format.decode(acts.format.encode(rest, params), params)
    if exempt is not None:
        rounded[:, exempt.long()] = flat[:, exempt.long()]
    rounded = rotate_channels(rounded) if rotated else rounded
    return rounded.view(x.shape)


def simulated_linear(
    x: Tensor,
    weight: Tensor,
    acts: Activations | None,
    calibrated: Params,
    *,
    exempt: Tensor | None,
    bias: Tensor | None,
    rotated: bool = False,
) -> Tensor:
    """Compute a linear with a decoded weight, in float32 if activations are rounded.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), decoded.
        acts: Quantization of x; None for no rounding.
        calibrated: Parameters of x from calibration.
        exempt: (k,) indices of columns of x that are not rounded; None for none.
        bias: (out,), or None.
        rotated: Whether x is rounded after a rotation of its channels.

    Returns:
        (..., out) in x's dtype.
    """
    if acts is None:
        return half_linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    rounded = round_activations(x, acts, calibrated, exempt, rotated=rotated)
    return F.linear(rounded, weight.float(), None if bias is None else bias.float()).to(x.dtype)


def integer_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    acts: Activations,
    calibrated: Params,
    *,
    outliers: Outliers | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute a linear as an int8 product, with a second product in 16 bit for the outlier columns.

    Args:
        x: (..., in), any float dtype.
        codes: (out, in) int8, codes of the weight.
        scale: Scale of the weight, (1,) or (out, 1).
        acts: Quantization of x to int8.
        calibrated: Parameters of x from calibration.
        outliers: Input columns in 16 bit; None for none.
        bias: (out,), or None.

    Returns:
        (..., out) in x's dtype.
    """

    def product(rows: Tensor) -> Tensor:
        """Compute the product of some rows of x (rows, in), in float32."""
        rest = _without(rows.float(), None if outliers is None else outliers.indices)
        params = _activation_params(rest, acts, calibrated)
        # The input is zero in outlier columns, so their codes do not matter.
        y = int8_product(acts.format.encode(rest, params), codes).float()
        y.mul_(params["scale"].float()).mul_(scale.float().reshape(1, -1))
        if outliers is not None:
            y.add_(_wide_product(rows[:, outliers.indices.long()], outliers.weight.to(x.dtype)))
        return y if bias is None else y.add_(bias.float())

    flat = x.reshape(-1, x.shape[-1])
    # A scale of x belongs to one token or to all inputs, so rows can be computed apart.
    chunks = flat.split(max(1, flat.shape[0]) if x.is_cuda else _ROWS)
    return torch.cat([product(rows).to(x.dtype) for rows in chunks]).view(*x.shape[:-1], codes.shape[0])


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b^T exactly.

    Args:
        a: (m, k) int8.
        b: (n, k) int8.

    Returns:
        (m, n) int32.
    """
    # For k = 1 torch's product on a CPU returns uninitialized memory.
    if a.device.type == "cpu" and a.shape[1] > 1:
        return torch._int_mm(a, b.T)
    if a.is_cuda and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        # cuBLAS requires more than 16 rows.
        m = a.shape[0]
        return torch._int_mm(F.pad(a, (0, 0, 0, max(0, 32 - m))), b.T)[:m]
    return exact_float_product(a, b)


def exact_float_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute `int8_product` in float32, in chunks of columns that are short enough to be exact.

    Args:
        a: (m, k) int8.
        b: (n, k) int8.

    Returns:
        (m, n) int32.
    """
    y = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for a_chunk, b_chunk in zip(a.split(_EXACT_COLUMNS, 1), b.split(_EXACT_COLUMNS, 1), strict=True):
        y += (a_chunk.float() @ b_chunk.float().T).to(torch.int32)
    return y


def _wide_product(x: Tensor, w: Tensor) -> Tensor:
    """Compute x w^T of 16-bit x (m, k) and w (n, k), summed in float32."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T


def _activation_params(x: Tensor, acts: Activations, calibrated: Params) -> Params:
    if acts.dynamic:
        return acts.format.fit(x, shared=calibrated)
    return {name: p.float() for name, p in calibrated.items()}


def _without(x: Tensor, columns: Tensor | None) -> Tensor:
    return x if columns is None else x.index_fill(1, columns.long(), 0)
