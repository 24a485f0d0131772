"""How transformers stacks the linears of all experts of a layer in a few tensors: names, order of rows, layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GATE_UP, UP, DOWN, BIAS = "gate_up_proj", "up_proj", "down_proj", "_bias"


class Projections(NamedTuple):
    """Names of an expert's linears in checkpoints."""

    gate: str
    up: str
    down: str


class Piece(NamedTuple):
    """Rows of a stacked tensor that are one linear of each expert.

    Attributes:
        linear: Name of the linear within an expert.
        leaf: `weight` or `bias`.
        rows: First row, last row (exclusive), and step.
    """

    linear: str
    leaf: str
    rows: tuple[int, int, int]


@dataclass(frozen=True)
class Stacking:
    """How the experts of a layer are stacked.

    Attributes:
        names: Names of an expert's linears.
        gated: Whether there is a gate.
        transposed: Whether matrices of the model are (in, out).
        transposed_in_files: Whether those of checkpoints are.
        interleaved: Whether rows of gate and up alternate.
        biased: Whether linears have biases.
        merged: Whether transformers reads tensors of single experts, where they are quantized.
        single: Whether it reads those in 16 bit.
    """

    names: Projections
    gated: bool = True
    transposed: bool = False
    transposed_in_files: bool = False
    interleaved: bool = False
    biased: bool = False
    merged: bool = True
    single: bool = True

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of an expert's linears, those before the activation function first."""
        return self.names if self.gated else self.names[1:]

    def pieces(self, leaf: str, intermediate: int, hidden: int) -> list[Piece]:
        """Return the linears in a stacked tensor; empty for any other tensor.

        Args:
            leaf: Name of the tensor in its module.
            intermediate: Width of an expert.
            hidden: Width of the model.
        """
        stack, of = leaf.removesuffix(BIAS), "bias" if leaf.endswith(BIAS) else "weight"
        if stack == DOWN:
            return [Piece(self.names.down, of, (0, hidden, 1))]
        if stack == UP and not self.gated:
            return [Piece(self.names.up, of, (0, intermediate, 1))]
        if stack != GATE_UP or not self.gated:
            return []
        both = 2 * intermediate
        rows = ((0, both, 2), (1, both, 2)) if self.interleaved else ((0, intermediate, 1), (intermediate, both, 1))
        return [Piece(name, of, r) for name, r in zip(self.names[:2], rows, strict=True)]
