"""Formats of numbers, and the quantized weights that are stored in them.

`Format` is the contract of all formats, `ScalarFormat` that of grids with one code a weight; `Quantized` is a weight as
it will be stored. Schemes (`formats.schemes`) name the combinations that users choose from.
"""

from __future__ import annotations

from laconic.formats.base import NO_PARAMS, Format, Params
from laconic.formats.quantized import LowRank, Outliers, Quantized, Transforms, quantize
from laconic.formats.scalar import ScalarFormat

__all__ = [
    "NO_PARAMS",
    "Format",
    "LowRank",
    "Outliers",
    "Params",
    "Quantized",
    "ScalarFormat",
    "Transforms",
    "quantize",
]
