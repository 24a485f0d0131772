"""Scalar formats: every weight has a code, and tiles of weights share a scale.

They work on *tiles* (`formats.tiling`): the elements that share parameters lie along the last dimension. Operations
that only the range searches and the column-by-column solvers need are here, not in the contract of all formats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laconic.formats.base import NO_PARAMS, Format, Params
from laconic.formats.tiling import CHANNEL, TENSOR, Tiling, groups_for


class ScalarFormat(Format):
    """A grid of values, one code a weight."""

    if TYPE_CHECKING:

        @property
        def tiling(self) -> Tiling:
            """Sets of weights that share their parameters."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """Dtype of codes in memory."""

    @property
    def headroom(self) -> float:
        """Upper end of the ranges worth trying, as a multiple of the largest value; 1 if steps are even."""
        return 1.0

    @property
    def widest_step(self) -> float:
        """Widest distance between two neighbouring values, in units (`unit`)."""
        return 1.0

    @property
    def row_unit(self) -> int | None:
        return self.tiling.block_structure[0] if self.tiling.block_structure else 1

    @property
    def column_unit(self) -> int | None:
        tiling = self.tiling
        return tiling.group_size or (tiling.block_structure[1] if tiling.block_structure else 1)

    @property
    def granularity(self) -> str:
        block = self.tiling.block_structure
        size = f" {self.tiling.group_size}" if self.tiling.group_size else f" {block[0]}x{block[1]}" if block else ""
        return f"{self.tiling.strategy}{size}"

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        size = self.tiling.group_size
        if size and shape[1] % size:
            raise ValueError(
                f"group_size {size} does not divide the {shape[1]} inputs of {name}; "
                f"use group_size: auto, one of {groups_for(shape[1])}, or ignore it"
            )

    def shared(self, lo: Tensor, hi: Tensor) -> Params:
        """Return the parameters that a whole tensor has one of, from the ranges of its tiles; by default none.

        Args:
            lo: Lowest value of each tile.
            hi: Highest value of each tile.

        Returns:
            Parameters by name, each (1,).
        """
        return NO_PARAMS

    @abstractmethod
    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NO_PARAMS) -> Params:
        """Return the parameters of tiles whose grids cover [lo, hi], without the shared ones.

        Args:
            lo: Lowest value of each tile.
            hi: Highest value of each tile.
            dtype: Dtype of parameters that the format leaves open.
            shared: Parameters of the whole tensor (`shared`).

        Returns:
            Parameters by name, each in the shape of `lo`.
        """

    def for_activations(self) -> ScalarFormat:
        """Return the format with the range that engines use when they quantize activations."""
        return self

    def retiled(self, tiling: Tiling) -> ScalarFormat | None:
        """Return the format with another tiling, or None if its tiling is fixed.

        Args:
            tiling: The new tiling.
        """
        return None

    def unit(self, params: Params) -> Tensor:
        """Return the factors of the values of codes: the scales, except in formats with scales of two levels.

        Args:
            params: Parameters, each in the shape of the tiles without their last dimension, or (1,).

        Returns:
            Factors in the shape of the scale, float32.
        """
        return params["scale"].float()

    @abstractmethod
    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        """Return the nearest codes of tiles.

        Args:
            tiles: (..., n) float32, elements that share parameters along the last dimension.
            params: Parameters, each of shape (...) or (1,).

        Returns:
            (..., n) codes in `code_dtype`.
        """

    @abstractmethod
    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        """Return the values that codes of tiles stand for.

        Args:
            codes: (..., n), as of `encode_tiles`.
            params: Parameters, each of shape (...) or (1,).

        Returns:
            (..., n) float32.
        """

    def snap_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        """Return tiles encoded and decoded again, in new memory.

        Args:
            tiles: (..., n) float32, elements that share parameters along the last dimension.
            params: Parameters, each of shape (...) or (1,).

        Returns:
            (..., n) float32.
        """
        return self.decode_tiles(self.encode_tiles(tiles, params), params)

    def fit(self, w: Tensor, dtype: torch.dtype = torch.float32, shared: Params | None = None) -> Params:
        """Choose min-max parameters.

        Args:
            w: (out, in), any float dtype.
            dtype: Dtype of parameters that the format leaves open.
            shared: Parameters of the whole tensor, if `w` is a part of one; None computes them from `w`.

        Returns:
            Parameters as they will be stored: each in the tiling's `param_shape`, shared ones (1,).

        Raises:
            ValueError: The group size does not divide `in`.
        """
        tiles = self.tiling.split(w.float())
        lo, hi = tiles.amin(-1), tiles.amax(-1)
        shared = self.shared(lo, hi) if shared is None else shared
        return {**self.from_range(lo, hi, dtype, shared), **shared}

    def fit_shared(self, w: Tensor) -> Params:
        """Return the parameters that a whole tensor has one of, by name, each (1,).

        Args:
            w: The whole matrix (out, in), any float dtype.
        """
        tiles = self.tiling.split(w.float())
        return self.shared(tiles.amin(-1), tiles.amax(-1))

    def encode(self, w: Tensor, params: Params) -> Tensor:
        return self.tiling.join(self.encode_tiles(self.tiling.split(w.float()), params), w.shape)

    def decode(self, codes: Tensor, params: Params, shape: tuple[int, int] | None = None) -> Tensor:
        return self.tiling.join(self.decode_tiles(self.tiling.split(codes), params), codes.shape)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Params]:
        w = torch.empty(shape, dtype=torch.float32, device="meta")
        return torch.empty(shape, dtype=self.code_dtype, device="meta"), self.fit(w, dtype)

    def cut_rows(
        self, codes: Tensor, params: Params, shape: tuple[int, int], start: int, stop: int
    ) -> tuple[Tensor, Params]:
        cut = self.tiling.cut_params
        return codes[start:stop], {name: cut(p, start, stop, shape[0]) for name, p in params.items()}

    def cut_columns(
        self, codes: Tensor, params: Params, shape: tuple[int, int], start: int, stop: int
    ) -> tuple[Tensor, Params]:
        cut = self.tiling.cut_columns_of_params
        part = codes[:, start:stop].contiguous()
        return part, {name: cut(p, start, stop, shape[1]) for name, p in params.items()}

    def to_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"num_bits": self.num_bits, "symmetric": self.symmetric}
        config["strategy"] = self.tiling.strategy
        if self.tiling.group_size:
            config["group_size"] = self.tiling.group_size
        if self.tiling.block_structure:
            config["block_structure"] = list(self.tiling.block_structure)
        return config


def tiling_from_config(config: Mapping[str, Any]) -> Tiling:
    """Return the tiling that an entry of config.json describes.

    Args:
        config: Keys of the entry: `strategy`, and `group_size` or `block_structure` where the strategy needs one.

    Raises:
        ValueError: The strategy is unknown, or the size that it needs is absent or less than 1.
    """
    strategy, block = config["strategy"], config.get("block_structure")
    return Tiling(
        strategy,
        config.get("group_size") if strategy == "group" else None,
        (block[0], block[1]) if block else None,
    )


def vary_tiling(tiling: Tiling, preset: str, group_size: int | None, strategy: str | None, *, grouped: bool) -> Tiling:
    """Return the tiling with the keys that a recipe may change.

    Args:
        tiling: Tiling of the preset.
        preset: Name of the preset, for messages.
        group_size: Columns that share a scale; -1 for the whole row.
        strategy: `tensor`, `channel` or `group`.
        grouped: Whether the format may have groups; those that have none may have one scale for the whole tensor.

    Raises:
        ValueError: The keys contradict each other or the preset.
    """
    if group_size is not None and strategy not in (None, "channel" if group_size == -1 else "group"):
        raise ValueError(f"group_size {group_size} contradicts strategy '{strategy}'")
    if group_size == -1 or strategy in ("tensor", "channel"):
        tiling = TENSOR if strategy == "tensor" else CHANNEL
    elif group_size is not None or strategy == "group":
        if not grouped:
            raise ValueError(f"{preset} has no groups: leave group_size out")
        tiling = Tiling("group", group_size if group_size is not None else 128)
    if tiling.strategy == "tensor" and grouped:
        raise ValueError(f"{preset} is stored by channel or by group: strategy 'tensor' is for W8A8 and FP8")
    return tiling


def as_scalar(fmt: Format) -> ScalarFormat:
    """Return a format as a scalar one, for methods that choose a code for each weight.

    Args:
        fmt: Format of a weight.

    Raises:
        ValueError: It is not scalar.
    """
    if not isinstance(fmt, ScalarFormat):
        raise ValueError(f"{fmt.title} has no code for each weight; use a scheme of integers or floats")
    return fmt
