"""Tensor parallelism of native linears: which rows and columns of the stored linears a rank holds.

vLLM fuses linears (q, k and v; gate and up) into one layer and cuts it over ranks: a column-parallel layer by rows of
each fused linear, a row-parallel one by columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol, Self, TypeVar

from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import Scheme


class ShardedLinear(Protocol):
    """A stored linear that can be cut: a whole `Quantized`, or its side tensors alone."""

    def rows(self, start: int, stop: int) -> Self:
        """Return the rows [start, stop)."""

    def columns(self, start: int, stop: int) -> Self:
        """Return the columns [start, stop)."""


L = TypeVar("L", bound=ShardedLinear)


@dataclass(frozen=True)
class Span:
    """Rows or columns [start, stop) of `whole`."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start

    @property
    def complete(self) -> bool:
        """Whether it is all of them."""
        return self.size == self.whole


@dataclass(frozen=True)
class Shard:
    """Share of a rank in a layer of one linear, or of several fused ones.

    Attributes:
        rows: Rows of each linear.
        columns: Columns, the same of all linears.
    """

    rows: tuple[Span, ...]
    columns: Span

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape (out, in) of each stored linear."""
        return tuple((rows.whole, self.columns.whole) for rows in self.rows)

    def check(self, scheme: Scheme, layer: str) -> None:
        """Check that linears of a scheme can be cut so.

        Args:
            scheme: Scheme of the linears.
            layer: Name of the layer, for the message.

        Raises:
            ValueError: Weights on both sides of a cut share a scale or a code, or a matrix mixes them.
        """
        fmt = scheme.weights
        for kind, spans, unit, mixed in (
            ("outputs", self.rows, fmt.row_unit, scheme.output_transform == 2),
            ("inputs", (self.columns,), fmt.column_unit, scheme.input_transform == 2 or scheme.input_rotation),
        ):
            for span in spans:
                if span.complete:
                    continue
                end = f"{kind} {span.start}:{span.stop} of {layer}"
                if mixed:
                    raise ValueError(
                        f"tensor parallelism cannot cut the {kind} of {layer}, which a matrix or a rotation mixes; "
                        "serve with --tensor-parallel-size 1"
                    )
                if unit is None or span.start % unit or (span.stop % unit and span.stop != span.whole):
                    tile = f"a {as_scalar(fmt).tiling.strategy} of {unit}" if unit else f"codes of {fmt.title}"
                    raise ValueError(
                        f"tensor parallelism would cut {tile} at {end}; serve with a smaller --tensor-parallel-size, "
                        "or compress with a group_size that divides the share of a rank"
                    )

    def cut(self, parts: Sequence[L]) -> list[L]:
        """Return the share of the rank in each linear.

        Args:
            parts: The stored linears, or one that they are stored as, its rows in their order.
        """
        if len(parts) < len(self.rows):
            (fused,) = parts
            ends = accumulate((rows.whole for rows in self.rows), initial=0)
            parts = [fused.rows(start, stop) for start, stop in pairwise(ends)]
        shares = []
        for part, rows in zip(parts, self.rows, strict=True):
            share = part if self.columns.complete else part.columns(self.columns.start, self.columns.stop)
            shares.append(share if rows.complete else share.rows(rows.start, rows.stop))
        return shares
