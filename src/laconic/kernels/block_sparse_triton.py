"""`block_sparse_linear` on a GPU, in Triton: a program multiplies one block row by a tile of tokens on tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.kernels.block_sparse_weight import BlockSparseWeight

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("block-sparse products on a GPU need Triton: pip install triton") from e

# Smallest side of a tensor core product.
_SIDE = 16
# Bytes of a multiprocessor's shared memory that tiles being loaded may take.
_SHARED = 200_000


def block_sparse_linear_triton(
    x: Tensor, W: BlockSparseWeight, *, tokens: int | None = None, parts: int | None = None
) -> Tensor:
    """Compute `block_sparse_linear` on CUDA tensors, or on any with Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        x: (tokens, in), in the dtype of the weight's values.
        W: Weight (out, in); the sides of its blocks are powers of two, 16 or more.
        tokens: Tokens of a program; None takes all, up to 128.
        parts: Number of parts that a block row is split into, so that few tokens use the whole GPU; the parts are
            summed in float32. None chooses it by the number of programs.

    Returns:
        (tokens, out) in the dtype of x.
    """
    n, _ = x.shape
    _, columns, rows = W.values.shape
    x = x.contiguous()
    tokens = tokens or min(128, max(_SIDE, triton.next_power_of_2(n)))
    # Programs that run at once share a block row; all tokens together stay in the L2 cache more easily than the weight.
    grid = triton.cdiv(n, tokens), W.shape[0] // rows
    parts = parts or _parts(grid[0] * grid[1], W.shape[1] // columns)
    y = torch.empty(parts, n, W.shape[0], dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _block_row[(*grid, parts)](
            x, W.values, W.col_indices, W.crow_indices, y,
            n, W.shape[1], W.shape[0],
            ROWS=rows, COLUMNS=columns, TOKENS=tokens, PARTS=parts,
            num_warps=8 if tokens * rows > 64 * 64 else 4,
            num_stages=max(1, min(4, _SHARED // ((tokens + rows) * columns * x.element_size()))),
        )  # fmt: skip
    return y[0] if parts == 1 else y.sum(0).to(x.dtype)


def _parts(programs: int, columns: int) -> int:
    """Split block rows until each of about 130 multiprocessors has two programs; a part keeps at least 8 blocks."""
    parts = 1
    while programs * parts < 264 and columns // (2 * parts) >= 8:
        parts *= 2
    return parts


@triton.jit  # type: ignore[untyped-decorator]
def _block_row(  # type: ignore[no-untyped-def]
    X, values, col_indices, crow_indices, Y,
    n, width, out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1), tl.program_id(2)
    first, last = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    share = tl.cdiv(last - first, PARTS)
    begin = first + part * share
    end = tl.minimum(begin + share, last)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x_at = X + t[:, None].to(tl.int64) * width + c[None, :]
    w_at = values + begin.to(tl.int64) * ROWS * COLUMNS + c[:, None] * ROWS + r[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for i in range(begin, end):
        x = tl.load(x_at + tl.load(col_indices + i) * COLUMNS, t[:, None] < n, 0.0)
        total = tl.dot(x, tl.load(w_at), total, input_precision="ieee")
        w_at += ROWS * COLUMNS
    y_at = Y + (part.to(tl.int64) * n + t[:, None]) * out + row * ROWS + r[None, :]
    tl.store(y_at, total.to(Y.dtype.element_ty), t[:, None] < n)
