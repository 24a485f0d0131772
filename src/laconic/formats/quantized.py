"""A quantized weight: codes, parameters, and 16-bit side tensors.

The decoded weight is W = T_out (C + L R) T_in Q, with C the decoded codes in which outlier columns replace theirs, L R
a low-rank product, T_out, T_in optional transforms of the output and input channels (a vector of signs or scales, or a
matrix), and Q an optional rotation of the input channels, which inputs go through before they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats.base import Format, Params
from laconic.formats.rotation import rotate_channels
from laconic.formats.scalar import ScalarFormat


@dataclass(frozen=True)
class Outliers:
    """Input columns in 16 bit.

    Attributes:
        indices: (k,) int32, ascending.
        weight: (out, k), in the model's dtype.
    """

    indices: Tensor
    weight: Tensor

    def rows(self, start: int, stop: int) -> Outliers:
        """Return the rows [start, stop) of the columns.

        Args:
            start: First row.
            stop: Row after the last.
        """
        return Outliers(self.indices.clone(), self.weight[start:stop])

    def columns(self, start: int, stop: int) -> Outliers:
        """Return those among the columns [start, stop), their indices counted from `start`; there may be none.

        Args:
            start: First column.
            stop: Column after the last.
        """
        inside = (self.indices >= start) & (self.indices < stop)
        return Outliers(self.indices[inside] - start, self.weight[:, inside].contiguous())


@dataclass(frozen=True)
class LowRank:
    """A product added to the decoded codes.

    Attributes:
        left: (out, r), in the model's dtype.
        right: (r, in), in the model's dtype.
    """

    left: Tensor
    right: Tensor

    def rows(self, start: int, stop: int) -> LowRank:
        """Return the rows [start, stop) of the product.

        Args:
            start: First row.
            stop: Row after the last.
        """
        return LowRank(self.left[start:stop], self.right.clone())

    def columns(self, start: int, stop: int) -> LowRank:
        """Return the columns [start, stop) of the product.

        Args:
            start: First column.
            stop: Column after the last.
        """
        return LowRank(self.left.clone(), self.right[:, start:stop].contiguous())


@dataclass(frozen=True)
class Transforms:
    """Transforms of channels that the decoded weight goes through.

    Attributes:
        input: (in,) factors of the input channels, or (in, in); None for none.
        output: (out,) factors of the output channels, or (out, out); None for none.
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def apply(self, w: Tensor) -> Tensor:
        """Return T_out w T_in.

        Args:
            w: (out, in) float32.

        Returns:
            (out, in) float32; `w` itself without transforms.
        """
        if self.input is not None:
            w = w * self.input.float() if self.input.dim() == 1 else w @ self.input.float()
        if self.output is not None:
            w = w * self.output.float()[:, None] if self.output.dim() == 1 else self.output.float() @ w
        return w

    def cut_rows(self, start: int, stop: int) -> Transforms:
        """Return the transforms of the rows [start, stop).

        Args:
            start: First row.
            stop: Row after the last.

        Raises:
            ValueError: A matrix mixes the rows.
        """
        if self.output is not None and self.output.dim() == 2:
            raise ValueError("rows that a matrix transforms together cannot be cut")
        # A file has no tensors that share memory.
        input_transform = None if self.input is None else self.input.clone()
        return Transforms(input_transform, None if self.output is None else self.output[start:stop])

    def cut_columns(self, start: int, stop: int) -> Transforms:
        """Return the transforms of the columns [start, stop).

        Args:
            start: First column.
            stop: Column after the last.

        Raises:
            ValueError: A matrix mixes the columns.
        """
        if self.input is not None and self.input.dim() == 2:
            raise ValueError("columns that a matrix transforms together cannot be cut")
        output_transform = None if self.output is None else self.output.clone()
        return Transforms(None if self.input is None else self.input[start:stop], output_transform)


@dataclass(frozen=True)
class Quantized:
    """A weight as it will be stored. The codes are the truth: nothing is rounded again after this.

    Attributes:
        format: Format of the codes and parameters.
        codes: Codes, in the shape and dtype that the format defines.
        params: Parameters by name, in their stored dtypes.
        shape: Shape (out, in) of the weight.
        outliers: Input columns in 16 bit; None for none.
        low_rank: A product in 16 bit; None for none.
        transforms: Transforms of the channels; None for none.
        input_rotation: Whether codes are those of W Q^T, Q the rotation of the input channels (`rotate_channels`).
    """

    format: Format
    codes: Tensor
    params: Params
    shape: tuple[int, int]
    outliers: Outliers | None = None
    low_rank: LowRank | None = None
    transforms: Transforms | None = None
    input_rotation: bool = False

    @classmethod
    def scalar(cls, fmt: ScalarFormat, codes: Tensor, params: Params) -> Quantized:
        """Return a weight of which every element has a code.

        Args:
            fmt: Format of the codes.
            codes: (out, in), in the format's `code_dtype`.
            params: Parameters as the format stores them.
        """
        return cls(fmt, codes, params, (codes.shape[0], codes.shape[1]))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in), computed in float32.

        Args:
            dtype: Dtype of the result.
        """
        w = self.format.decode(self.codes, self.params, self.shape)
        if self.outliers is not None:
            w[:, self.outliers.indices.long()] = self.outliers.weight.float()
        if self.low_rank is not None:
            w += self.low_rank.left.float() @ self.low_rank.right.float()
        if self.transforms is not None:
            w = self.transforms.apply(w)
        if self.input_rotation:
            w = rotate_channels(w)
        return w.to(dtype)

    def rows(self, start: int, stop: int) -> Quantized:
        """Return the rows [start, stop) as a quantized weight.

        Args:
            start: First row.
            stop: Row after the last.

        Raises:
            ValueError: Weights on both sides of the cut share parameters or a code, or a transform mixes the rows.
        """
        codes, params = self.format.cut_rows(self.codes, self.params, self.shape, start, stop)
        return Quantized(
            self.format,
            codes,
            params,
            (stop - start, self.shape[1]),
            self.outliers and self.outliers.rows(start, stop),
            self.low_rank and self.low_rank.rows(start, stop),
            self.transforms and self.transforms.cut_rows(start, stop),
            self.input_rotation,
        )

    def columns(self, start: int, stop: int) -> Quantized:
        """Return the columns [start, stop) as a quantized weight; products with such parts of an input add up.

        Args:
            start: First column.
            stop: Column after the last.

        Raises:
            ValueError: Weights on both sides of the cut share parameters or a code, or a transform or a rotation mixes
                the columns.
        """
        if self.input_rotation:
            raise ValueError("columns that a rotation mixes cannot be cut")
        codes, params = self.format.cut_columns(self.codes, self.params, self.shape, start, stop)
        return Quantized(
            self.format,
            codes,
            params,
            (self.shape[0], stop - start),
            self.outliers and self.outliers.columns(start, stop),
            self.low_rank and self.low_rank.columns(start, stop),
            self.transforms and self.transforms.cut_columns(start, stop),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to write, by their name within the linear."""
        tensors = self.format.to_tensors(self.codes, self.params)
        if self.outliers is not None:
            tensors |= {"outlier_indices": self.outliers.indices, "outlier_weight": self.outliers.weight}
        if self.low_rank is not None:
            tensors |= {"low_rank_left": self.low_rank.left, "low_rank_right": self.low_rank.right}
        if self.transforms is not None:
            sides = {"input_transform": self.transforms.input, "output_transform": self.transforms.output}
            tensors |= {name: transform for name, transform in sides.items() if transform is not None}
        return tensors

    @classmethod
    def from_tensors(
        cls, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int], *, input_rotation: bool = False
    ) -> Quantized:
        """Return the weight that a linear's tensors in a file stand for: the inverse of `to_tensors`.

        Args:
            fmt: Format of the codes.
            tensors: Tensors by their name within the linear.
            shape: Shape (out, in) of the weight.
            input_rotation: Whether codes are those of a weight with rotated input channels.
        """
        outliers = low_rank = transforms = None
        if "outlier_indices" in tensors:
            outliers = Outliers(tensors["outlier_indices"], tensors["outlier_weight"])
        if "low_rank_left" in tensors:
            low_rank = LowRank(tensors["low_rank_left"], tensors["low_rank_right"])
        if "input_transform" in tensors or "output_transform" in tensors:
            transforms = Transforms(tensors.get("input_transform"), tensors.get("output_transform"))
        codes, params = fmt.from_tensors(tensors, shape)
        return cls(fmt, codes, params, shape, outliers, low_rank, transforms, input_rotation)


def quantize(fmt: Format, w: Tensor, params: Params) -> Quantized:
    """Round a weight to the nearest codes.

    Args:
        fmt: Format of the codes.
        w: (out, in), any float dtype.
        params: Parameters as the format stores them.

    Returns:
        The quantized weight, without side tensors.
    """
    return Quantized(fmt, fmt.encode(w, params), params, (w.shape[0], w.shape[1]))
