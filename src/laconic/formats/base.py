"""The contract of a format: how a weight matrix is stored in few bits, from values to named tensors and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
"""Tensors that a format needs beside the codes to decode them, by name: `scale`, `zero_point`, `global_scale`, ..."""

NO_PARAMS: Params = MappingProxyType({})


class Format(ABC):
    """A way to store a matrix: codes and parameters, their names in a file, their description in config.json.

    A format knows nothing of models or of how a value was chosen. Codes need not have the matrix's shape. Formats are
    frozen dataclasses: equal formats store alike. A new one is one file and one preset in `formats.schemes`.
    """

    if TYPE_CHECKING:
        # For type checkers alone: a property at run time would stand in the way of a dataclass field of its name.
        @property
        def num_bits(self) -> int:
            """Nominal bits of one weight, parameters not counted."""

        @property
        def symmetric(self) -> bool:
            """Whether values are spread evenly around zero, without a zero point."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name for people, without the granularity: `int4`, `NVFP4`."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """Name of the layout in the file: compressed-tensors' word for it where it has one."""

    @property
    def granularity(self) -> str:
        """Name of the weights that share parameters, for people: `channel`, `group 128`; empty if there is none."""
        return ""

    @property
    def standard(self) -> bool:
        """Whether compressed-tensors can describe and read the format; if not, artifacts are native."""
        return True

    @property
    def row_unit(self) -> int | None:
        """Number of rows between two places where the matrix can be cut; None where it cannot be cut at all."""
        return 1

    @property
    def column_unit(self) -> int | None:
        """Number of columns between two places where the matrix can be cut; None where it cannot be cut at all."""
        return None

    @property
    def word_codes(self) -> int:
        """Number of neighbouring codes that fill whole words of the file, so that none is cut; 1 if a byte has one."""
        return 1

    @property
    def readable(self) -> bool:
        """Whether `from_tensors` reads all parameters that the layout may hold."""
        return True

    @property
    def table(self) -> bool:
        """Whether engines can look up single rows of the stored matrix, as embeddings need."""
        return False

    @property
    def regroupable(self) -> bool:
        """Whether a recipe's `group_size` can choose the columns that share a scale."""
        return False

    def unpacked(self) -> Format:
        """Return the format with one code a byte; the format itself if it has no such layout."""
        return self

    @property
    def integer_range(self) -> tuple[int, int] | None:
        """Lowest and highest code where values are `scale * (code - zero_point)`; None for all others."""
        return None

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:  # noqa: B027 - formats that take any shape
        """Check that a linear can be stored.

        Args:
            name: Name of the linear, for the message.
            shape: Shape (out, in) of its weight.

        Raises:
            ValueError: The shape does not fit; the message names the fix.
        """

    @abstractmethod
    def fit(self, w: Tensor, dtype: torch.dtype = torch.float32) -> Params:
        """Choose the default parameters for a matrix.

        Args:
            w: (out, in), any float dtype.
            dtype: Dtype of parameters that the format leaves open, usually the model's.

        Returns:
            The parameters as they will be stored.
        """

    @abstractmethod
    def encode(self, w: Tensor, params: Params) -> Tensor:
        """Return the nearest codes of a matrix.

        Args:
            w: (out, in), any float dtype.
            params: Parameters as `fit` returns them.

        Returns:
            Codes in the shape and dtype that the format defines.
        """

    @abstractmethod
    def decode(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Return the values that codes stand for.

        Args:
            codes: Codes as `encode` returns them.
            params: Parameters as `fit` returns them.
            shape: Shape (out, in) of the matrix.

        Returns:
            (out, in) float32.
        """

    @abstractmethod
    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Params]:
        """Return codes and parameters of a matrix as tensors on the meta device.

        Args:
            shape: Shape (out, in) of the matrix.
            dtype: Dtype of parameters that the format leaves open, usually the model's.
        """

    @abstractmethod
    def to_tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Return the tensors to write, by their name within the linear (`weight_packed`, `weight_scale`, ...).

        Args:
            codes: Codes as `encode` returns them.
            params: Parameters as `fit` returns them.
        """

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        """Return codes and parameters from the tensors of a file: the inverse of `to_tensors`.

        Args:
            tensors: Tensors of one linear, by name; those that belong to other parts of it are ignored.
            shape: Shape (out, in) of the weight.
        """

    @abstractmethod
    def cut_rows(
        self, codes: Tensor, params: Params, shape: tuple[int, int], start: int, stop: int
    ) -> tuple[Tensor, Params]:
        """Return codes and parameters of the rows [start, stop) of a matrix.

        Args:
            codes: Codes of the whole matrix.
            params: Its parameters.
            shape: Its shape (out, in).
            start: First row.
            stop: Row after the last.

        Raises:
            ValueError: Weights on both sides of the cut share parameters or a code.
        """

    def cut_columns(
        self, codes: Tensor, params: Params, shape: tuple[int, int], start: int, stop: int
    ) -> tuple[Tensor, Params]:
        """Return codes and parameters of the columns [start, stop) of a matrix.

        Args:
            codes: Codes of the whole matrix.
            params: Its parameters.
            shape: Its shape (out, in).
            start: First column.
            stop: Column after the last.

        Raises:
            ValueError: Weights on both sides of the cut share parameters or a code.
        """
        raise ValueError(f"columns of {self.title} cannot be cut")

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return the entry of `config_groups` in config.json: compressed-tensors' keys where `standard`."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the format that an entry describes, or None if it describes another kind.

        Args:
            config: Keys of an entry, `format` (the layout) among them; absent keys have compressed-tensors' defaults.

        Raises:
            ValueError: It is a variation of this kind that cannot be read.
        """

    def vary(self, preset: str, *, group_size: int | None, symmetric: bool | None, strategy: str | None) -> Format:
        """Return the format with the keys that a recipe may change.

        Args:
            preset: Name of the scheme, for messages.
            group_size: Columns that share a scale; -1 for the whole row.
            symmetric: Whether there is no zero point.
            strategy: `tensor`, `channel` or `group`.

        Raises:
            ValueError: The format cannot be varied so; the message names the fix.
        """
        for key, value in (("group_size", group_size), ("symmetric", symmetric), ("strategy", strategy)):
            if value is not None:
                raise ValueError(f"{preset} has no {key}: leave it out")
        return self
