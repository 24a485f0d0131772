"""`add_side_products` for few tokens on a GPU, in Triton: one kernel that gathers outlier columns, multiplies and adds.

While text is generated a layer has few tokens, and the time of small products is that of their launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Smallest and largest side of a tensor core product here.
_SIDE, _TOKENS, _INNER = 16, 64, 64
_ROWS = 32


def add_side_products_triton(
    y: Tensor, x: Tensor, projected: Tensor | None, indices: Tensor | None, weight: Tensor
) -> Tensor:
    """Compute y + [x_O, p] weight^T on CUDA tensors, or on any with Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        y: (tokens, out), the product of the codes.
        x: (tokens, in), the input.
        projected: (tokens, r), p, the input times R^T; None for none.
        indices: (k,) int64, outlier columns O; None for none.
        weight: (out, k + r).

    Returns:
        (tokens, out) in y's dtype.
    """
    tokens, outputs = y.shape
    y, x = y.contiguous(), x.contiguous()
    columns = 0 if indices is None else len(indices)
    rank = 0 if projected is None else projected.shape[1]
    out = torch.empty_like(y)
    # Never read, but compiled: a pointer to indices must be one to integers.
    indices = torch.empty(0, dtype=torch.int64, device=x.device) if indices is None else indices
    tile = min(_TOKENS, max(_SIDE, triton.next_power_of_2(tokens)))
    inner = min(_INNER, max(_SIDE, triton.next_power_of_2(max(columns, rank))))
    grid = triton.cdiv(outputs, _ROWS), triton.cdiv(tokens, tile)
    with torch.cuda.device_of(x):
        _add_side_products[grid](
            y, x, x if projected is None else projected, indices, weight, out,
            tokens, outputs, x.shape[1], columns, rank,
            TOKENS=tile, ROWS=_ROWS, INNER=inner, num_warps=4,
        )  # fmt: skip
    return out


# Layers differ in these numbers, and must not be compiled for each.
@triton.jit(do_not_specialize=["tokens", "columns", "rank"])  # type: ignore[untyped-decorator]
def _add_side_products(  # type: ignore[no-untyped-def]
    y_ptr, x_ptr, projected_ptr, indices_ptr, weight_ptr, out_ptr,
    tokens, outputs, inputs, columns, rank,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_row, is_token = row < outputs, token < tokens
    weight_row = weight_ptr + row.to(tl.int64)[None, :] * (columns + rank)
    place = token[:, None] * outputs + row[None, :]
    is_place = is_token[:, None] & is_row[None, :]
    total = tl.load(y_ptr + place, mask=is_place, other=0.0).to(tl.float32)
    for start in range(0, columns, INNER):
        k = start + tl.arange(0, INNER)
        column = tl.load(indices_ptr + k, mask=k < columns, other=0)
        a = tl.load(
            x_ptr + token[:, None] * inputs + column[None, :],
            mask=is_token[:, None] & (k < columns)[None, :],
            other=0.0,
        )
        b = tl.load(weight_row + k[:, None], mask=(k < columns)[:, None] & is_row[None, :], other=0.0)
        total = tl.dot(a, b, total)
    for start in range(0, rank, INNER):
        k = start + tl.arange(0, INNER)
        a = tl.load(
            projected_ptr + token[:, None] * rank + k[None, :],
            mask=is_token[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        b = tl.load(weight_row + columns + k[:, None], mask=(k < rank)[:, None] & is_row[None, :], other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_place)
