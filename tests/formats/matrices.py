"""What the tests of formats are tried on: every tiling, every format, and matrices that hypothesis draws."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from laconic.formats import Format
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling

ROW = Tiling("channel")
TILINGS = (Tiling("tensor"), ROW, Tiling("token"), Tiling("group", 4), Tiling("block", block_structure=(3, 5)))

FORMATS: tuple[Format, ...] = (
    *(IntAffine(bits, symmetric, ROW) for bits in range(2, 9) for symmetric in (True, False)),
    *(IntAffine(bits, True, ROW, narrow=True) for bits in (6, 8)),
    Fp8(ROW),
    MxFp4(ROW),
    NvFp4(ROW),
)

# As large and as small as a float32 may be, short of where twice a value overflows.
FINITE = st.floats(-(2.0**126), 2.0**126, width=32)
ORDINARY = st.floats(-100, 100, width=32, allow_subnormal=False)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def matrices(elements: st.SearchStrategy[float] = ORDINARY, *, multiple_of: int = 1) -> st.SearchStrategy[Tensor]:
    """Matrices of up to 9 rows, whose columns are a multiple of a number."""
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 12 // multiple_of).map(lambda n: n * multiple_of))
    drawn = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))
    return drawn.map(torch.from_numpy)


def name(value: object) -> str:
    """A short name for a format or a tiling, in the list of tests."""
    match value:
        case IntAffine():
            kind = "narrow" if value.narrow else "symmetric" if value.symmetric else "asymmetric"
            return f"int{value.num_bits}-{kind}"
        case Tiling():
            return value.strategy
        case _:
            return type(value).__name__.lower()
