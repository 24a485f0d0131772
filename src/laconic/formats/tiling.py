"""Tilings: which elements of a matrix share one scale: the whole tensor, a row, a group in a row, or a rectangle.

`split` lays a (out, in) matrix out as (*param_shape, n): elements that share parameters lie along the last dimension,
so a format needs one code path for every strategy. `join` is its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

Strategy = Literal["tensor", "channel", "group", "block", "token"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Tiling:
    """One way to share parameters.

    Attributes:
        strategy: `tensor`, `channel` (one scale a row), `group`, `block`; `token` is `channel` of activations.
        group_size: Columns of a group; None for other strategies.
        block_structure: (rows, columns) of a block; None for other strategies.
    """

    strategy: Strategy
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy '{self.strategy}': choose one of {', '.join(STRATEGIES)}")
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with strategy 'group', and only with it")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1 (or -1 for one per channel), not {self.group_size}")
        if (self.strategy == "block") != (self.block_structure is not None):
            raise ValueError("block_structure goes with strategy 'block', and only with it")

    def param_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter of a matrix.

        Args:
            shape: Shape (out, in) of the matrix.

        Raises:
            ValueError: The group size does not divide `in`.
        """
        rows, cols = shape
        match self.strategy:
            case "tensor":
                return (1,)
            case "channel" | "token":
                return (rows, 1)
            case "group":
                assert self.group_size is not None
                if cols % self.group_size:
                    raise ValueError(f"group_size {self.group_size} does not divide {cols} columns")
                return (rows, cols // self.group_size)
            case "block":
                assert self.block_structure is not None
                height, width = self.block_structure
                return (-(-rows // height), -(-cols // width))

    def split(self, w: Tensor) -> Tensor:
        """Lay out a matrix so that elements that share parameters lie along the last dimension.

        A block that reaches over the edge is padded with zeros.

        Args:
            w: (out, in), any dtype.

        Returns:
            (*param_shape, n).

        Raises:
            ValueError: The group size does not divide `in`.
        """
        shape = self.param_shape(tuple(w.shape))
        if self.strategy != "block":
            return w.reshape(*shape, -1)
        assert self.block_structure is not None
        height, width = self.block_structure
        down, right = shape[0] * height - w.shape[0], shape[1] * width - w.shape[1]
        if down or right:
            w = pad(w, (0, right, 0, down))
        return w.reshape(shape[0], height, shape[1], width).transpose(1, 2).reshape(*shape, height * width)

    def join(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Lay out tiles as a matrix: the inverse of `split`; its padding is cut off.

        Args:
            tiles: (*param_shape, n), any dtype.
            shape: Shape (out, in) of the matrix.

        Returns:
            (out, in).
        """
        if self.strategy != "block":
            return tiles.reshape(shape)
        assert self.block_structure is not None
        height, width = self.block_structure
        down, across = tiles.shape[:2]
        whole = tiles.reshape(down, across, height, width).transpose(1, 2).reshape(down * height, across * width)
        return whole[: shape[0], : shape[1]].contiguous()

    def cut_params(self, param: Tensor, start: int, stop: int, rows: int) -> Tensor:
        """Return the parameters of the rows [start, stop) of a matrix.

        Args:
            param: Parameter of the whole matrix, in its `param_shape`, or (1,).
            start: First row.
            stop: Row after the last.
            rows: Number of rows of the whole matrix.

        Raises:
            ValueError: A block would be cut.
        """
        if param.dim() == 1:  # one for the whole tensor
            return param.clone()
        match self.strategy:
            case "block":
                assert self.block_structure is not None
                height = self.block_structure[0]
                if start % height or (stop % height and stop != rows):
                    raise ValueError(f"rows {start}:{stop} cut a block of {height} rows")
                return param[start // height : -(-stop // height)]
            case _:
                return param[start:stop]

    def cut_columns_of_params(self, param: Tensor, start: int, stop: int, columns: int) -> Tensor:
        """Return the parameters of the columns [start, stop) of a matrix.

        Args:
            param: Parameter of the whole matrix, in its `param_shape`, or (1,).
            start: First column.
            stop: Column after the last.
            columns: Number of columns of the whole matrix.

        Raises:
            ValueError: A group or a block would be cut.
        """
        width = self.group_size or (self.block_structure[1] if self.block_structure else None)
        if param.dim() == 1 or width is None:  # one for the whole tensor, or one a row
            return param.clone()
        if start % width or (stop % width and stop != columns):
            raise ValueError(f"columns {start}:{stop} cut a {self.strategy} of {width} columns")
        return param[:, start // width : -(-stop // width)].contiguous()


# Sizes among which `group_size: auto` chooses: those that every kernel of vLLM for packed integers takes.
AUTO_GROUP_SIZES = (128, 64, 32)

CHANNEL = Tiling("channel")
TOKEN = Tiling("token")
TENSOR = Tiling("tensor")


def auto_tiling(columns: int) -> Tiling:
    """Return the tiling that `group_size: auto` stands for: the largest group that divides, else one scale a channel.

    Args:
        columns: number that a group must divide, the inputs of a linear or those of one tensor-parallel shard of it.
    """
    size = next((g for g in AUTO_GROUP_SIZES if columns % g == 0), None)
    return Tiling("group", size) if size else CHANNEL


def groups_for(columns: int) -> str:
    """Return the group sizes that rows can have, for messages: the two largest usual ones, and -1, the whole row.

    Args:
        columns: Number of columns of a row.
    """
    return ", ".join(str(g) for g in [*[g for g in (128, 64, 32, 16, 8) if columns % g == 0][:2], -1])
