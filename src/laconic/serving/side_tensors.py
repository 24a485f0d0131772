"""Products of the 16-bit side tensors of a layer, around an engine's product of the codes.

y = C x_R + [W_O, L] [x_O; R x], where x_R is the input with zeros in the outlier columns O: they are multiplied with no
codes, and do not widen the scale of a token (LLM.int8, arXiv 2208.07339). Both side products are one matrix product. No
shape depends on data: outlier columns are those of calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats import LowRank, Outliers

# Products of 16-bit matrices are fast where their inner dimension is a multiple of this.
_ALIGNMENT = 8

# Number of tokens up to which one kernel of Triton takes less time than the launches of torch's.
_FEW_TOKENS = 64


@dataclass(frozen=True)
class StoredSides:
    """Side tensors of one linear, as they are stored.

    Attributes:
        shape: Shape (out, in) of the linear.
        outliers: Input columns in 16 bit; None for none.
        low_rank: A product in 16 bit; None for none.
    """

    shape: tuple[int, int]
    outliers: Outliers | None = None
    low_rank: LowRank | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> StoredSides:
        """Return those among a linear's tensors.

        Args:
            tensors: Tensors by their name within the linear.
            shape: Shape (out, in) of the linear.
        """
        outliers = low_rank = None
        if "outlier_indices" in tensors:
            outliers = Outliers(tensors["outlier_indices"], tensors["outlier_weight"])
        if "low_rank_left" in tensors:
            low_rank = LowRank(tensors["low_rank_left"], tensors["low_rank_right"])
        return cls(shape, outliers, low_rank)

    def rows(self, start: int, stop: int) -> StoredSides:
        """Return those of the rows [start, stop).

        Args:
            start: First row.
            stop: Row after the last.
        """
        return StoredSides(
            (stop - start, self.shape[1]),
            self.outliers and self.outliers.rows(start, stop),
            self.low_rank and self.low_rank.rows(start, stop),
        )

    def columns(self, start: int, stop: int) -> StoredSides:
        """Return those of the columns [start, stop).

        Args:
            start: First column.
            stop: Column after the last.
        """
        return StoredSides(
            (self.shape[0], stop - start),
            self.outliers and self.outliers.columns(start, stop),
            self.low_rank and self.low_rank.columns(start, stop),
        )


@dataclass(frozen=True)
class SideTensors:
    """Side tensors of a layer of one linear, or of several fused ones.

    Attributes:
        weight: (out, k + r), [W_O, L], padded with zero columns to a multiple of 8.
        indices: (k,) int64, outlier columns; None for none.
        mask: (in,) bool, true in outlier columns; None for none.
        right: (r, in), R; None for none.
    """

    weight: Tensor
    indices: Tensor | None = None
    mask: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def combine(cls, parts: Sequence[StoredSides], rows: int, dtype: torch.dtype) -> SideTensors | None:
        """Return the side tensors of linears that are fused row by row; None if they have none.

        Args:
            parts: The linears; those that have outlier columns have the same ones.
            rows: Number of outputs of the layer: of all parts, and of padding after them.
            dtype: Dtype to compute in.

        Raises:
            ValueError: The linears have different outlier columns.
        """
        columns = common_columns([q.outliers for q in parts])
        products = [q.low_rank for q in parts]
        outliers = columns if columns is not None and len(columns) else None
        if outliers is None and not any(products):
            return None
        mask = None
        blocks: list[Tensor] = []
        if outliers is not None:
            blocks.append(torch.cat([q.outliers.weight for q in parts if q.outliers]).to(dtype))
            mask = torch.zeros(parts[0].shape[1], dtype=torch.bool, device=outliers.device)
            mask[outliers] = True
        left, right = _stack_products(parts, products, dtype)
        if left is not None:
            blocks.append(left)
        padding = -sum(b.shape[1] for b in blocks) % _ALIGNMENT
        if outliers is not None:
            # Any column will do, since its weights are zero.
            outliers = torch.cat([outliers, outliers[:1].expand(padding)])
            blocks.insert(1, blocks[0].new_zeros(len(blocks[0]), padding))
        elif right is not None:
            right = torch.cat([right, right.new_zeros(padding, right.shape[1])])
            blocks.append(blocks[0].new_zeros(len(blocks[0]), padding))
        weight = torch.cat(blocks, 1)
        weight = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
        return cls(weight.contiguous(), outliers, mask, right)

    def coded_input(self, x: Tensor) -> Tensor:
        """Return the input of the codes: x with zeros in outlier columns.

        Args:
            x: (..., in).
        """
        return x if self.mask is None else torch.where(self.mask, 0, x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a product of codes with the side products added.

        Args:
            y: (..., out), the product of the codes.
            x: (..., in) 16-bit input of the layer.

        Returns:
            (..., out) in y's dtype.
        """
        flat, coded = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        result: Tensor = add_side_products(coded, flat, self.indices, self.right, self.weight)
        return result.view(y.shape)


def compile_kernels(sides: SideTensors) -> None:
    """Run the kernels of a layer for few tokens once, since CUDA graphs cannot be captured while one is compiled.

    Args:
        sides: Side tensors of the layer; nothing is done where they are on a CPU.
    """
    inputs = None if sides.mask is None else len(sides.mask)
    inputs = sides.right.shape[1] if sides.right is not None else inputs
    if not sides.weight.is_cuda or inputs is None:
        return
    for tokens in (1, _FEW_TOKENS // 2, _FEW_TOKENS):
        y, x = (sides.weight.new_zeros(tokens, n) for n in (len(sides.weight), inputs))
        sides.add_to(y, x)


# An operator of its own, since compilers trace a layer for any number of tokens, and the kernel is for few.
@torch.library.custom_op("laconic::add_side_products", mutates_args=())
def add_side_products(y: Tensor, x: Tensor, indices: Tensor | None, right: Tensor | None, weight: Tensor) -> Tensor:
    """Compute y + [x_O, x R^T] weight^T.

    Args:
        y: (tokens, out), the product of the codes.
        x: (tokens, in) 16-bit input.
        indices: (k,) int64, outlier columns O; None for none.
        right: (r, in), R; None for none.
        weight: (out, k + r).

    Returns:
        (tokens, out) in y's dtype.
    """
    projected = None if right is None else torch.mm(x, right.T)
    if x.is_cuda and len(x) <= _FEW_TOKENS and y.dtype in (torch.bfloat16, torch.float16):
        from laconic.serving.side_triton import add_side_products_triton

        return add_side_products_triton(y, x, projected, indices, weight)
    return add_side_products_torch(y, x, projected, indices, weight)


@add_side_products.register_fake
def _(y: Tensor, x: Tensor, indices: Tensor | None, right: Tensor | None, weight: Tensor) -> Tensor:
    return torch.empty_like(y)


def add_side_products_torch(
    y: Tensor, x: Tensor, projected: Tensor | None, indices: Tensor | None, weight: Tensor
) -> Tensor:
    """Compute y + [x_O, p] weight^T in plain torch.

    Args:
        y: (tokens, out), the product of the codes.
        x: (tokens, in), the input.
        projected: (tokens, r), p, the input times R^T; None for none.
        indices: (k,) int64, outlier columns O; None for none.
        weight: (out, k + r).

    Returns:
        (tokens, out) in y's dtype.
    """
    inputs = [] if indices is None else [x.index_select(1, indices)]
    if projected is not None:
        inputs.append(projected)
    return torch.addmm(y, inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1), weight.T)


def common_columns(outliers: Sequence[Outliers | None]) -> Tensor | None:
    """Return the outlier columns of fused linears, (k,) int64; None for none.

    Args:
        outliers: Those of each linear.

    Raises:
        ValueError: They differ.
    """
    present = [o.indices for o in outliers if o is not None]
    if not present:
        return None
    if len(present) < len(outliers) or any(not torch.equal(i, present[0]) for i in present):
        raise ValueError(
            "linears that vLLM fuses have different outlier columns in this artifact; compress it again with one "
            "scheme for them"
        )
    return present[0].long()


def _stack_products(
    parts: Sequence[StoredSides], products: Sequence[LowRank | None], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the products of fused linears as one: L (out, r) and R (r, in)."""
    present = [p for p in products if p is not None]
    if not present:
        return None, None
    if len(present) == len(parts) and all(torch.equal(p.right, present[0].right) for p in present):
        return torch.cat([p.left for p in present]).to(dtype), present[0].right.to(dtype).contiguous()
    left = torch.zeros(
        sum(q.shape[0] for q in parts),
        sum(p.left.shape[1] for p in present),
        dtype=dtype,
        device=present[0].left.device,
    )
    row = column = 0
    for part, p in zip(parts, products, strict=True):
        if p is not None:
            height, width = p.left.shape
            left[row : row + height, column : column + width] = p.left
            column += width
        row += part.shape[0]
    return left, torch.cat([p.right for p in present]).to(dtype).contiguous()
