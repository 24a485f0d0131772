"""Zeros of a weight: pruning by magnitude, and detection of sparsity patterns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laconic.solvers.masks import MaskStructure, keep_mask

# From the largest: kernels are faster for larger blocks.
BLOCKS = (128, 64, 32, 16)
# A smaller share of zeros does not count as a pattern.
_MIN_SHARE = 0.05
# A larger block is preferred if it has this share of the zero blocks of the best size.
_PREFER_LARGER = 0.9


@dataclass(frozen=True)
class Zeros:
    """Sparsity pattern of a weight.

    Attributes:
        share: Share of zero weights.
        pattern: `2:4`, `block N`, `unstructured` or `none`.
        block: Side of the zero blocks, for a block pattern.
        block_share: Share of blocks that are all zero.
    """

    share: float
    pattern: str
    block: int | None = None
    block_share: float = 0.0


def zeros_of(W: Tensor) -> Zeros:
    """Return the most regular pattern of the zeros of a weight.

    Args:
        W: (out, in).
    """
    share = float((W == 0).float().mean())
    block_shares = {n: _zero_block_share(W, n) for n in BLOCKS if W.shape[0] % n == 0 and W.shape[1] % n == 0}
    if block_shares and (most := max(block_shares.values())) > _MIN_SHARE:
        size = next(n for n, block_share in block_shares.items() if block_share >= _PREFER_LARGER * most)
        return Zeros(share, f"block {size}", size, block_shares[size])
    if is_2_of_4(W) and share > _MIN_SHARE:
        return Zeros(share, "2:4")
    return Zeros(share, "unstructured" if share > _MIN_SHARE else "none")


def is_2_of_4(W: Tensor) -> bool:
    """Return whether at most two of every four neighbours in a row are nonzero.

    Args:
        W: (out, in).
    """
    return W.shape[1] % 4 == 0 and bool(((W.reshape(-1, 4) != 0).sum(-1) <= 2).all())


def to_2_of_4(W: Tensor) -> Tensor:
    """Set the two smallest of every four neighbours in a row to zero.

    Args:
        W: (out, in), `in` a multiple of 4.

    Returns:
        The pruned weight, of the same shape and dtype.
    """
    return _prune(W, 0.5, MaskStructure(group=(2, 4)))


def to_unstructured(W: Tensor, sparsity: float) -> Tensor:
    """Set the smallest weights to zero, wherever they are.

    Args:
        W: (out, in).
        sparsity: Share of the weights to prune.

    Returns:
        The pruned weight, of the same shape and dtype.
    """
    return _prune(W, sparsity, MaskStructure())


def to_zero_blocks(W: Tensor, size: int, sparsity: float) -> Tensor:
    """Set the square blocks with the smallest norms to zero.

    Args:
        W: (out, in).
        size: Side of the blocks.
        sparsity: Share of the blocks to prune.

    Returns:
        The pruned weight, of the same shape and dtype.

    Raises:
        ValueError: The block size does not divide W.
    """
    if W.shape[0] % size or W.shape[1] % size:
        raise ValueError(f"blocks of {size} x {size} do not divide a weight of {W.shape[0]} x {W.shape[1]}")
    return _prune(W, sparsity, MaskStructure(tile=(size, size)))


def _prune(W: Tensor, sparsity: float, structure: MaskStructure) -> Tensor:
    return W.masked_fill(~keep_mask(W.float().square(), sparsity, structure, "matrix"), 0)


def _zero_block_share(W: Tensor, size: int) -> float:
    """Return the share of blocks (size, size) that are all zero."""
    blocks = W.reshape(W.shape[0] // size, size, W.shape[1] // size, size)
    return float((blocks == 0).all(3).all(1).float().mean())
