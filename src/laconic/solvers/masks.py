"""Pruning masks from scores: unstructured per row or per matrix, N of every M inputs, or tiles.

Scores are squared importances (w^2 times the energy of the input), so that the scores of a tile add up to about the
output error without it. Among equal scores the first weight is pruned; exactly the requested number is pruned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ComparisonGroup = Literal["row", "matrix"]
"""Weights that are compared with each other: those of an output row (or row of tiles), or all of a matrix."""


@dataclass(frozen=True)
class MaskStructure:
    """Structure of a pruning mask; unstructured if neither attribute is set.

    Attributes:
        group: (N, M): N weights remain of every M neighbouring inputs of a row.
        tile: (rows, columns) of the tiles that remain or are pruned as a whole.
    """

    group: tuple[int, int] | None = None
    tile: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        """Number of rows pruned together."""
        return self.tile[0] if self.tile else 1

    @property
    def width(self) -> int:
        """Number of neighbouring inputs whose mask is chosen together."""
        return self.tile[1] if self.tile else self.group[1] if self.group else 1

    @property
    def sparsity(self) -> float | None:
        """Sparsity, where the structure fixes it; otherwise None."""
        return 1 - self.group[0] / self.group[1] if self.group else None


def parse_mask_structure(text: str) -> MaskStructure:
    """Parse `unstructured`, `N:M` (2:4: two of four inputs remain) or `RxC` (tiles of R rows and C columns).

    Args:
        text: `mask_structure` of a recipe.

    Returns:
        The structure.

    Raises:
        ValueError: The text is none of these.
    """
    if text == "unstructured":
        return MaskStructure()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return MaskStructure(group=(n, m))
        raise ValueError(f"mask_structure '{text}' should keep at least one and less than all, as 2:4 does")
    if (match := re.fullmatch(r"(\d+)x(\d+)", text)) and int(match[1]) * int(match[2]) > 1:
        return MaskStructure(tile=(int(match[1]), int(match[2])))
    raise ValueError(f"unknown mask_structure '{text}': write unstructured, N:M as in 2:4, or RxC as in 16x16")


@dataclass(frozen=True)
class StackedLinear:
    """One of several linears whose rows are stacked into one matrix.

    Attributes:
        rows: Rows of the matrix that belong to this linear.
        sparsity: Share of its weights to prune.
        protected: (rows, 1) or (1, in) bool: rows or columns that are not pruned and do not count; None for none.
    """

    rows: slice
    sparsity: float
    protected: Tensor | None = None


def single_linear(weight: Tensor, sparsity: float) -> list[StackedLinear]:
    """Describe a matrix as a stack of one linear.

    Args:
        weight: (out, in).
        sparsity: Share of weights to prune.

    Returns:
        A list of that linear, without protected rows or columns.
    """
    return [StackedLinear(slice(0, len(weight)), sparsity)]


def keep_mask_of_stack(
    scores: Tensor,
    linears: Sequence[StackedLinear],
    structure: MaskStructure,
    comparison_group: ComparisonGroup,
    first: int = 0,
) -> Tensor:
    """Choose the weights of stacked linears that remain, within each linear by itself.

    Args:
        scores: (out, n) scores of n neighbouring inputs.
        linears: The linears of the stack.
        structure: Structure of the mask.
        comparison_group: Weights that are compared with each other.
        first: Index of the first of the n inputs.

    Returns:
        (out, n) bool, True for weights that remain.
    """
    n = scores.shape[1]
    keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    for linear in linears:
        mask, own_scores, protected = keep[linear.rows], scores[linear.rows], linear.protected
        if protected is None:
            mask.copy_(keep_mask(own_scores, linear.sparsity, structure, comparison_group))
        elif protected.shape[1] == 1:
            rows = (~protected[:, 0]).nonzero().flatten()
            mask[rows] = keep_mask(own_scores[rows], linear.sparsity, structure, comparison_group)
        else:
            columns = (~protected[0, first : first + n]).nonzero().flatten()
            mask[:, columns] = keep_mask(own_scores[:, columns], linear.sparsity, structure, comparison_group)
    return keep


def keep_mask(
    scores: Tensor, sparsity: float, structure: MaskStructure, comparison_group: ComparisonGroup = "row"
) -> Tensor:
    """Choose the weights of a matrix that remain.

    Args:
        scores: (out, in).
        sparsity: Share of weights to prune; unused for N:M, which fixes it.
        structure: Structure of the mask.
        comparison_group: Weights that are compared with each other; unused for N:M.

    Returns:
        (out, in) bool, True for weights that remain.

    Raises:
        ValueError: The structure does not divide the matrix.
    """
    rows, columns = scores.shape
    if rows % structure.height or columns % structure.width:
        raise ValueError(f"a matrix of {rows} by {columns} does not consist of {structure.height} by {structure.width}")
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if structure.group:
        n, m = structure.group
        return _mask_lowest(scores.reshape(-1, m), m - n).view(scores.shape)
    if structure.tile:
        height, width = structure.tile
        tiles = scores.view(rows // height, height, columns // width, width).sum((1, 3))
        keep = keep_mask(tiles, sparsity, MaskStructure(), comparison_group)
        return keep.repeat_interleave(height, 0).repeat_interleave(width, 1)
    lines = scores if comparison_group == "row" else scores.reshape(1, -1)
    return _mask_lowest(lines, round(sparsity * lines.shape[1])).view(scores.shape)


# Up to this width, counting how many scores precede each is faster than selecting the k-th.
_COUNTED_WIDTH = 16


def _mask_lowest(scores: Tensor, pruned: int) -> Tensor:
    """Mask the `pruned` lowest scores of every row as False, among equal ones the first."""
    n = scores.shape[1]
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if n <= _COUNTED_WIDTH:
        rank = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
        for k in range(n):
            score = scores[:, k : k + 1]
            rank[:, : k + 1] += score < scores[:, : k + 1]
            rank[:, k + 1 :] += score <= scores[:, k + 1 :]
        return rank >= pruned
    limit = scores.kthvalue(pruned, 1, keepdim=True).values
    keep = scores > limit
    # Several scores may equal the limit: as many of them remain as are missing, the last ones.
    missing = n - pruned - keep.sum(1)
    short = (missing > 0).nonzero().flatten()
    if len(short):
        equal = scores[short] == limit[short]
        from_last = equal.flip(1).cumsum(1).flip(1)
        keep[short] |= equal & (from_last <= missing[short, None])
    return keep
