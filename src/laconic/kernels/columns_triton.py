"""`affine_columns` on a GPU: one launch for all columns of a unit, the errors so far kept in registers."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("rounding on a GPU needs Triton: pip install triton (on Windows, triton-windows)") from e

# Columns a launch: their errors fill the registers, and wider units pass feedback on by matrix product.
_COLUMNS = 128
# Rows a program, and warps that share its sums over columns: on an H200 the fastest, or nearly, of 16 to 128 rows and
# 1 to 8 warps, for weights of 4096 rows as of 28672.
_ROWS, _WARPS = 16, 2


def affine_columns_triton(
    W: Tensor, X: Tensor, A: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """`affine_columns` for CUDA tensors, or any when Triton's interpreter runs it (TRITON_INTERPRET=1).

    Rounds half to even, divides truly and multiplies in full float32, as `affine_columns_torch` does. Only the order
    in which float32 sums are rounded differs: a value that close to a tie may fall to its other side, and the columns
    after it then answer for the error it has.

    W, X, scale, zero_point: (n, rows) float32, of any strides, expanded ones too. A: (n, n) float32, strictly lower
    triangular. Returns: codes (n, rows) int8 and E (n, rows) float32.
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
                float(qmin), float(qmax),
                COLUMNS=max(16, triton.next_power_of_2(j - i)), ROWS=_ROWS,
                # Fused into the subtraction, c * s would not be the value that the code decodes to.
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
        # Clamping to whole numbers may as well come first; then no value is too large for the rounding, which lifts it
        # to where neighbouring floats are one apart, half to even as all float32 sums are.
        c = tl.minimum(tl.maximum(tl.math.div_rn(x, s), qmin - z), qmax - z)
        c = (c + 12582912.0) - 12582912.0
        e = w - c * s
        errors = tl.where(k[:, None] == j, e[None, :], errors)
        tl.store(codes + j * rows + row, (c + z).to(tl.int8), here)
        tl.store(E + j * rows + row, e, here)


def _contiguous_rows(t: Tensor) -> Tensor:
    """`t` (n, rows), copied unless neighbouring rows lie side by side; columns may lie anywhere, even in one place."""
    return t if t.stride(1) == 1 else t.contiguous()
