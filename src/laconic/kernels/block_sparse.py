"""A linear whose weight is kept as the rectangular blocks that are not zero, block row by block row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Blocks:
    """A weight (out, in) as its blocks that are not zero.

    values: (blocks, columns, rows), in the order of reading, each block transposed, so that those of a block row are
    one matrix. column: (blocks,) int32, in which block column each lies. start: (out / rows + 1,) int32, where each
    block row begins in them. shape: of the weight.
    """

    values: Tensor
    column: Tensor
    start: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self.values.nbytes + self.column.nbytes + self.start.nbytes

    @property
    def density(self) -> float:
        """The share of the weight that is kept."""
        return self.values.numel() / (self.shape[0] * self.shape[1])

    def dense(self) -> Tensor:
        """The weight (out, in), zeros and all."""
        _, c, r = self.values.shape
        counts = self.start.diff().long()
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        grid = self.values.new_zeros(self.shape[0] // r, self.shape[1] // c, r, c)
        grid[row, self.column.long()] = self.values.mT
        return grid.transpose(1, 2).reshape(self.shape)


def to_blocks(W: Tensor, block: tuple[int, int]) -> Blocks:
    """Keep of W (out, in) the blocks (rows, columns) that hold any number but zero.

    Raises: ValueError when blocks do not divide the weight.
    """
    (out, width), (r, c) = W.shape, block
    if out % r or width % c:
        raise ValueError(f"blocks of {r} x {c} do not divide a weight of {out} x {width}; choose a size that does")
    grid = W.reshape(out // r, r, width // c, c).transpose(1, 2)
    kept = (grid != 0).flatten(2).any(-1)
    row, column = kept.nonzero(as_tuple=True)
    start = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Blocks(grid[row, column].mT.contiguous(), column.to(torch.int32), start, (out, width))


def block_sparse_linear(x: Tensor, W: Blocks) -> Tensor:
    """x W^T, of which zero blocks take no time.

    x: (tokens, in), in the values' dtype. Returns: (tokens, out) in that dtype; sums are float32 or better.
    """
    if x.is_cuda:
        from laconic.kernels.block_sparse_triton import block_sparse_linear_triton

        return block_sparse_linear_triton(x, W)
    return block_sparse_linear_torch(x, W)


def block_sparse_linear_torch(x: Tensor, W: Blocks) -> Tensor:
    """`block_sparse_linear` in plain torch: the reference, and what a CPU runs.

    A block row is one dense product with the channels of x that it reads.
    """
    _, columns, rows = W.values.shape
    tokens, width = x.shape
    y = x.new_zeros(W.shape[0], tokens)
    # Channels lie in rows, so that those of a block are copied as one piece.
    channels = x.T.contiguous().view(width // columns, columns * tokens)
    starts = W.start.tolist()
    for i, (begin, end) in enumerate(pairwise(starts)):
        if begin < end:
            read = channels.index_select(0, W.column[begin:end]).view(-1, tokens)
            torch.mm(W.values[begin:end].view(-1, rows).T, read, out=y[i * rows : (i + 1) * rows])
    return y.T
