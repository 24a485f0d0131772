"""Zeros of a weight: put there by magnitude, and what pattern they have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laconic.solvers.masks import MaskStructure, keep_mask

# From the largest: larger blocks are multiplied faster.
BLOCKS = (128, 64, 32, 16)
# Fewer zeros than this share are chance.
_CHANCE = 0.05
# Of the zero blocks of the best size, so many are as good if blocks are larger.
_AS_GOOD = 0.9


@dataclass(frozen=True)
class Zeros:
    """share: of the weights that are zero. pattern: `2:4`, `block N`, `unstructured`, or `none`. block_share: of
    blocks that are all zero."""

    share: float
    pattern: str
    block: int | None = None
    block_share: float = 0.0


def zeros_of(W: Tensor) -> Zeros:
    """The most regular pattern that the zeros of W (out, in) have."""
    share = float((W == 0).float().mean())
    empty = {n: _empty(W, n) for n in BLOCKS if W.shape[0] % n == 0 and W.shape[1] % n == 0}
    if empty and (most := max(empty.values())) > _CHANCE:
        size = next(n for n, share_of_n in empty.items() if share_of_n >= _AS_GOOD * most)
        return Zeros(share, f"block {size}", size, empty[size])
    if is_2_of_4(W) and share > _CHANCE:
        return Zeros(share, "2:4")
    return Zeros(share, "unstructured" if share > _CHANCE else "none")


def is_2_of_4(W: Tensor) -> bool:
    """Whether no four neighbours in a row of W (out, in) hold more than two numbers but zero."""
    return W.shape[1] % 4 == 0 and bool(((W.reshape(-1, 4) != 0).sum(-1) <= 2).all())


def to_2_of_4(W: Tensor) -> Tensor:
    """W (out, in) with the two smallest of every four neighbours set to zero."""
    return _without(W, 0.5, MaskStructure(group=(2, 4)))


def to_unstructured(W: Tensor, sparsity: float) -> Tensor:
    """W with this share of its numbers, the smallest, set to zero."""
    return _without(W, sparsity, MaskStructure())


def to_zero_blocks(W: Tensor, size: int, sparsity: float) -> Tensor:
    """W (out, in) with this share of its blocks (size, size), those of the smallest norm, set to zero.

    Raises: ValueError when such blocks do not divide it.
    """
    if W.shape[0] % size or W.shape[1] % size:
        raise ValueError(f"blocks of {size} x {size} do not divide a weight of {W.shape[0]} x {W.shape[1]}")
    return _without(W, sparsity, MaskStructure(tile=(size, size)))


def _without(W: Tensor, sparsity: float, structure: MaskStructure) -> Tensor:
    return W.masked_fill(~keep_mask(W.float().square(), sparsity, structure, "matrix"), 0)


def _empty(W: Tensor, size: int) -> float:
    """The share of blocks (size, size) that are all zero."""
    blocks = W.reshape(W.shape[0] // size, size, W.shape[1] // size, size)
    return float((blocks == 0).all(3).all(1).float().mean())
