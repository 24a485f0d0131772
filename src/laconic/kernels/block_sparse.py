"""Product with a block-sparse weight: the torch reference, and the choice of a kernel by device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from laconic.kernels.block_sparse_weight import BlockSparseWeight


def block_sparse_linear(x: Tensor, W: BlockSparseWeight) -> Tensor:
    """Compute x W^T; zero blocks of W cost no time.

    Args:
        x: (tokens, in), in the dtype of the weight's values.
        W: Weight (out, in).

    Returns:
        (tokens, out) in the same dtype; sums are float32 or better.
    """
    if x.is_cuda:
        from laconic.kernels.block_sparse_triton import block_sparse_linear_triton

        return block_sparse_linear_triton(x, W)
    return block_sparse_linear_torch(x, W)


def block_sparse_linear_torch(x: Tensor, W: BlockSparseWeight) -> Tensor:
    """Compute `block_sparse_linear` in plain torch: the reference implementation, used on a CPU.

    A block row is one dense product with the channels of x that its blocks read.

    Args:
        x: (tokens, in), in the dtype of the weight's values.
        W: Weight (out, in).

    Returns:
        (tokens, out) in the same dtype.
    """
    _, columns, rows = W.values.shape
    tokens, width = x.shape
    y = x.new_zeros(W.shape[0], tokens)
    # Channels lie in rows, so that the channels of one block are copied as one piece.
    channels = x.T.contiguous().view(width // columns, columns * tokens)
    starts = W.crow_indices.tolist()
    for i, (begin, end) in enumerate(pairwise(starts)):
        if begin < end:
            block_inputs = channels.index_select(0, W.col_indices[begin:end]).view(-1, tokens)
            torch.mm(W.values[begin:end].view(-1, rows).T, block_inputs, out=y[i * rows : (i + 1) * rows])
    return y.T
