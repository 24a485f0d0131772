"""A weight stored as its non-zero rectangular blocks, in block compressed sparse row (BSR) layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class BlockSparseWeight:
    """A weight (out, in) as its non-zero blocks, block row by block row.

    Attributes:
        values: (blocks, columns, rows), each block transposed, so that the blocks of one block row form one matrix.
        col_indices: (blocks,) int32, the block column of each block.
        crow_indices: (out / rows + 1,) int32, the index of the first block of each block row; the last entry is the
            number of blocks.
        shape: Shape (out, in) of the dense weight.
    """

    values: Tensor
    col_indices: Tensor
    crow_indices: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of both index tensors."""
        return self.values.nbytes + self.col_indices.nbytes + self.crow_indices.nbytes

    @property
    def density(self) -> float:
        """Share of the dense weight that is stored."""
        return self.values.numel() / (self.shape[0] * self.shape[1])

    def dense(self) -> Tensor:
        """Return the dense weight (out, in)."""
        _, c, r = self.values.shape
        counts = self.crow_indices.diff().long()
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        grid = self.values.new_zeros(self.shape[0] // r, self.shape[1] // c, r, c)
        grid[row, self.col_indices.long()] = self.values.mT
        return grid.transpose(1, 2).reshape(self.shape)


def to_block_sparse(W: Tensor, block: tuple[int, int]) -> BlockSparseWeight:
    """Store the blocks of a weight that hold at least one non-zero number.

    Args:
        W: Weight (out, in).
        block: Rows and columns of a block.

    Returns:
        The weight in block-sparse layout, in the dtype of W.

    Raises:
        ValueError: The block size does not divide the weight.
    """
    (out, width), (r, c) = W.shape, block
    if out % r or width % c:
        raise ValueError(f"blocks of {r} x {c} do not divide a weight of {out} x {width}; choose a size that does")
    grid = W.reshape(out // r, r, width // c, c).transpose(1, 2)
    stored = (grid != 0).flatten(2).any(-1)
    row, column = stored.nonzero(as_tuple=True)
    crow_indices = F.pad(stored.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return BlockSparseWeight(grid[row, column].mT.contiguous(), column.to(torch.int32), crow_indices, (out, width))
