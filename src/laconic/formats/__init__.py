"""How a number is stored: what a Format is, and what a quantized tensor holds.

A format knows nothing of models, of files, or of how a value was chosen. Every format works on *tiles*
(`formats.tiling`): the elements that share one set of parameters lie along the last dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from laconic.formats.tiling import Tiling

Params = Mapping[str, Tensor]
"""What a format needs beside the codes to decode them: `scale`, `zero_point` where asymmetric, `global_scale`.
Each has one value a tile (`Tiling.param_shape`), or one for the whole tensor, shape (1,)."""

NOTHING: Params = MappingProxyType({})


class Format(Protocol):
    """How a tensor is stored in few bits. `fit -> params`, `encode -> codes`, `decode -> values`."""

    @property
    def num_bits(self) -> int:
        """Bits of one code."""

    @property
    def symmetric(self) -> bool:
        """Whether the grid is centred on zero (and so has no zero point)."""

    @property
    def tiling(self) -> Tiling:
        """Which elements share their parameters."""

    @property
    def headroom(self) -> float:
        """How far a range may usefully reach past the largest value, as a multiple of it: 1 where steps are even."""

    @property
    def widest(self) -> float:
        """The widest step between two codes, in units."""

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype codes have in memory (int8, float8_e4m3fn, uint8)."""

    def shared(self, lo: Tensor, hi: Tensor) -> Params:
        """The parameters that a whole tensor has one of, shape (1,), from the ranges of its tiles: mostly none."""

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NOTHING) -> Params:
        """The parameters of tiles, beside the `shared` ones, whose grids cover [lo, hi]: already as they are stored,
        in `dtype` where the format leaves that open."""

    def unit(self, params: Params) -> Tensor:
        """What the values of codes are multiplied by, float32."""

    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        """Codes (`code_dtype`) of `tiles` (..., n) under params of shape (...) or (1,)."""

    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        """Values (float32) of codes (..., n) under params of shape (...) or (1,)."""

    def snap_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        """What `tiles` are once encoded and decoded, in new memory."""


def fit(fmt: Format, w: Tensor, dtype: torch.dtype = torch.float32, shared: Params | None = None) -> Params:
    """Min-max parameters of `w`, stored in `dtype`. shared: those of the tensor that `w` is a part of, if it is."""
    tiles = fmt.tiling.split(w.float())
    lo, hi = tiles.amin(-1), tiles.amax(-1)
    shared = fmt.shared(lo, hi) if shared is None else shared
    return {**fmt.from_range(lo, hi, dtype, shared), **shared}


def fit_shared(fmt: Format, w: Tensor) -> Params:
    """The parameters that all of `w` has one of."""
    tiles = fmt.tiling.split(w.float())
    return fmt.shared(tiles.amin(-1), tiles.amax(-1))


def encode(fmt: Format, w: Tensor, params: Params) -> Tensor:
    """Codes of `w`, in the shape of `w`."""
    return fmt.tiling.join(fmt.encode_tiles(fmt.tiling.split(w.float()), params), w.shape)


def decode(fmt: Format, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of `codes`: computed in float32, returned in `dtype`."""
    return fmt.tiling.join(fmt.decode_tiles(fmt.tiling.split(codes), params), codes.shape).to(dtype)


@dataclass(frozen=True)
class Outliers:
    """Input columns that are kept in 16 bit. indices: (k,) int32, rising. weight: (out, k), in the model's dtype."""

    indices: Tensor
    weight: Tensor


@dataclass(frozen=True)
class LowRank:
    """A product that is added to what the codes stand for. left: (out, r), right: (r, in), in the model's dtype."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Quantized:
    """A weight as it will be stored. The codes are the truth: nothing is rounded again after this.

    codes: the weight's own shape, `format.code_dtype`. params: shapes by `format.tiling`. Beside them, in 16 bit:
    outliers, columns that stand in place of their codes; low_rank, a product on top of all.
    """

    format: Format
    codes: Tensor
    params: Params
    outliers: Outliers | None = None
    low_rank: LowRank | None = None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that all this stands for: computed in float32, returned in `dtype`."""
        if self.outliers is None and self.low_rank is None:
            return decode(self.format, self.codes, self.params, dtype)
        w = decode(self.format, self.codes, self.params)
        if self.outliers is not None:
            w[:, self.outliers.indices.long()] = self.outliers.weight.float()
        if self.low_rank is not None:
            w += self.low_rank.left.float() @ self.low_rank.right.float()
        return w.to(dtype)

    def rows(self, start: int, stop: int) -> Quantized:
        """The rows [start, stop) on their own. One tile must not reach over the cut.

        Raises: ValueError when the format's tiles cannot be cut there.
        """
        cut = self.format.tiling.cut_params
        params = {name: cut(p, start, stop, self.codes.shape[0]) for name, p in self.params.items()}
        outliers, low_rank = self.outliers, self.low_rank
        return Quantized(
            self.format,
            self.codes[start:stop],
            params,
            outliers and Outliers(outliers.indices.clone(), outliers.weight[start:stop]),
            low_rank and LowRank(low_rank.left[start:stop], low_rank.right.clone()),
        )


def quantize(fmt: Format, w: Tensor, params: Params) -> Quantized:
    """`w` rounded to the nearest code under `params`."""
    return Quantized(fmt, encode(fmt, w, params), params)
