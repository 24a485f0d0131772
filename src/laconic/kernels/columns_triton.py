"""`affine_columns` on a GPU, in Triton: one launch for up to 128 columns, their errors held in registers."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("rounding on a GPU needs Triton: pip install triton (on Windows, triton-windows)") from e

# Columns of a launch: their errors fill the registers; in wider units a matrix product carries errors between launches.
_COLUMNS = 128
# Rows of a program, and warps that share its sums over columns: on an H200 within a few per cent of the fastest of 16
# to 128 rows and 1 to 8 warps, for weights of 4096 and of 28672 rows.
_ROWS, _WARPS = 16, 2


def affine_columns_triton(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute `affine_columns` on CUDA tensors, or on any with Triton's interpreter (TRITON_INTERPRET=1).

    Rounds half to even, uses true division and multiplies in full float32, as `affine_columns_torch` does. Only the
    order of float32 sums differs: a value within that error of a tie may be rounded to the other side, and later
    columns then compensate the error it has.

    Args:
        W: (n, rows) float32, the values to approximate; any strides, also of an expanded tensor.
        X: (n, rows) float32, W with the compensation of the errors of all earlier units added; any strides.
        A: (n, n) float32, strictly lower triangular.
        scale: (n, rows) float32, any strides.
        zero_point: (n, rows) float32, any strides, or None for symmetric grids.
        code_range: Smallest and largest code.

    Returns:
        Codes (n, rows) int8 and errors E (n, rows) float32.
    """
    n, rows = W.shape
    W, X, A, scale = _contiguous_rows(W), _contiguous_rows(X), _contiguous_rows(A), _contiguous_rows(scale)
    zero_point = None if zero_point is None else _contiguous_rows(zero_point)
    codes = torch.empty(n, rows, dtype=torch.int8, device=W.device)
    E = torch.empty(n, rows, device=W.device)
    for i in range(0, n, _COLUMNS):
        j = min(i + _COLUMNS, n)
        x = torch.addmm(X[i:j], A[i:j, :i], E[:i]) if i else X[:j]
        w, a, s, z = W[i:j], A[i:j, i:j], scale[i:j], None if zero_point is None else zero_point[i:j]
        with torch.cuda.device_of(w):
            _round_columns[(triton.cdiv(rows, _ROWS),)](
                w, x, a, s, z, codes[i:j], E[i:j],
                j - i, rows, w.stride(0), x.stride(0), a.stride(0), s.stride(0), 0 if z is None else z.stride(0),
                float(code_range[0]), float(code_range[1]),
                COLUMNS=max(16, triton.next_power_of_2(j - i)), ROWS=_ROWS,
                # With a fused multiply-add, c * s would differ from the decoded value of the code.
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, E


@triton.jit  # type: ignore[untyped-decorator]
def _round_columns(  # type: ignore[no-untyped-def]
    W, X, A, scale, zero_point, codes, E,
    n, rows, W_stride, X_stride, A_stride, scale_stride, zero_point_stride,
    qmin, qmax,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    k = tl.arange(0, COLUMNS)
    errors = tl.zeros((COLUMNS, ROWS), tl.float32)
    for j in range(n):
        w = tl.load(W + j * W_stride + row, here, 0.0)
        x = tl.load(X + j * X_stride + row, here, 0.0)
        s = tl.load(scale + j * scale_stride + row, here, 1.0)
        z = 0.0 if zero_point is None else tl.load(zero_point + j * zero_point_stride + row, here, 0.0)
        a = tl.load(A + j * A_stride + k, k < j, 0.0)
        x += tl.sum(a[:, None] * errors, 0)
        # Clamping to whole numbers commutes with rounding. It comes first, so that no value is too large for the
        # rounding, which adds 1.5 * 2^23: there neighbouring floats are 1 apart, and sums round half to even.
        c = tl.minimum(tl.maximum(tl.math.div_rn(x, s), qmin - z), qmax - z)
        c = (c + 12582912.0) - 12582912.0
        e = w - c * s
        errors = tl.where(k[:, None] == j, e[None, :], errors)
        tl.store(codes + j * rows + row, (c + z).to(tl.int8), here)
        tl.store(E + j * rows + row, e, here)


def _contiguous_rows(t: Tensor) -> Tensor:
    """Copy `t` (n, rows) unless its rows are contiguous; columns may have any stride, also 0."""
    return t if t.stride(1) == 1 else t.contiguous()
