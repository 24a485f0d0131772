"""Which weights to keep, given what each is worth: the best of a row or of a matrix, N of every M inputs, or tiles.

Scores are worths in squares (w^2 times what the input weighs), so that those of a tile add up to about what the output
loses without it. Among equals the first goes; so much and no more goes as was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ComparisonGroup = Literal["row", "matrix"]
"""Among which weights the least go: those of an output row (of tiles), or all of a matrix."""


@dataclass(frozen=True)
class MaskStructure:
    """What goes together. group: (N, M), N kept of every M inputs of a row. tile: (rows, columns) that stay or go."""

    group: tuple[int, int] | None = None
    tile: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        """Rows that go together."""
        return self.tile[0] if self.tile else 1

    @property
    def width(self) -> int:
        """Neighbouring inputs that have to be chosen from at once."""
        return self.tile[1] if self.tile else self.group[1] if self.group else 1

    @property
    def sparsity(self) -> float | None:
        """The share that goes, where the structure fixes it."""
        return 1 - self.group[0] / self.group[1] if self.group else None


def parse_mask_structure(text: str) -> MaskStructure:
    """`unstructured`, `N:M` (2:4: two of four inputs are kept), or `RxC` (tiles of R rows and C columns).

    Raises: ValueError for anything else.
    """
    if text == "unstructured":
        return MaskStructure()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, of = int(match[1]), int(match[2])
        if 0 < kept < of:
            return MaskStructure(group=(kept, of))
        raise ValueError(f"mask_structure '{text}' should keep at least one and less than all, as 2:4 does")
    if (match := re.fullmatch(r"(\d+)x(\d+)", text)) and int(match[1]) * int(match[2]) > 1:
        return MaskStructure(tile=(int(match[1]), int(match[2])))
    raise ValueError(f"unknown mask_structure '{text}': write unstructured, N:M as in 2:4, or RxC as in 16x16")


@dataclass(frozen=True)
class StackedLinear:
    """One of several linears whose rows are stacked. rows: which of the stack. sparsity: the share that goes. protected:
    (rows, 1) or (1, in) bool, rows or columns that stay as they are and do not count."""

    rows: slice
    sparsity: float
    protected: Tensor | None = None


def single_linear(weight: Tensor, sparsity: float) -> list[StackedLinear]:
    """A matrix (out, in) as the only part of its stack."""
    return [StackedLinear(slice(0, len(weight)), sparsity)]


def keep_mask_of_stack(
    scores: Tensor, parts: Sequence[StackedLinear], structure: MaskStructure, among: ComparisonGroup, first: int = 0
) -> Tensor:
    """Which weights of stacked linears to keep, (out, n) bool: each linear's own least go.

    scores: (out, n) of n neighbouring inputs, the first of which is input `first`.
    """
    n = scores.shape[1]
    keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    for part in parts:
        own, protected = keep[part.rows], part.protected
        if protected is None:
            own.copy_(keep_mask(scores[part.rows], part.sparsity, structure, among))
        elif protected.shape[1] == 1:
            rows = (~protected[:, 0]).nonzero().flatten()
            own[rows] = keep_mask(scores[part.rows][rows], part.sparsity, structure, among)
        else:
            columns = (~protected[0, first : first + n]).nonzero().flatten()
            own[:, columns] = keep_mask(scores[part.rows][:, columns], part.sparsity, structure, among)
    return keep


def keep_mask(scores: Tensor, sparsity: float, structure: MaskStructure, among: ComparisonGroup = "row") -> Tensor:
    """Which weights of a matrix to keep, (out, in) bool.

    scores: (out, in). sparsity: the share that goes, which N:M has in itself. Raises: ValueError when the structure
    does not divide the matrix.
    """
    rows, columns = scores.shape
    if rows % structure.height or columns % structure.width:
        raise ValueError(f"a matrix of {rows} by {columns} does not consist of {structure.height} by {structure.width}")
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if structure.group:
        kept, of = structure.group
        return _without_least(scores.reshape(-1, of), of - kept).view(scores.shape)
    if structure.tile:
        height, width = structure.tile
        tiles = scores.view(rows // height, height, columns // width, width).sum((1, 3))
        keep = keep_mask(tiles, sparsity, MaskStructure(), among)
        return keep.repeat_interleave(height, 0).repeat_interleave(width, 1)
    lines = scores if among == "row" else scores.reshape(1, -1)
    return _without_least(lines, round(sparsity * lines.shape[1])).view(scores.shape)


def _without_least(scores: Tensor, gone: int) -> Tensor:
    """All but the `gone` least of every row; of equals, the first go."""
    n = scores.shape[1]
    if gone == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if n <= _FEW:
        # How many come before it: for the few of a group, counted faster than sorted.
        before = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
        for k in range(n):
            other = scores[:, k : k + 1]
            before[:, : k + 1] += other < scores[:, : k + 1]
            before[:, k + 1 :] += other <= scores[:, k + 1 :]
        return before >= gone
    limit = scores.kthvalue(gone, 1, keepdim=True).values
    keep = scores > limit
    # More than one may have the value of the last to go.
    spare = n - gone - keep.sum(1)
    short = (spare > 0).nonzero().flatten()
    if len(short):
        equal = scores[short] == limit[short]
        from_last = equal.flip(1).cumsum(1).flip(1)
        keep[short] |= equal & (from_last <= spare[short, None])
    return keep


_FEW = 16
