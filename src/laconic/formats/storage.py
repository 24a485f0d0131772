"""Shapes and sizes of a quantized weight in a file, for a scheme.

Codes and parameters have the names that their format gives them (`Format.to_tensors`). The 16-bit side tensors beside
them have names of our own: outlier_indices (k,) int32, outlier_weight (out, k); low_rank_left (out, r), low_rank_right
(r, in); input_transform (in,) or (in, in); output_transform (out,) or (out, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from laconic.formats.quantized import LowRank, Outliers, Quantized, Transforms
from laconic.formats.schemes import Scheme


def scheme_of_shapes(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> Scheme:
    """Return the scheme with the side tensors that a finished file has.

    Args:
        scheme: as planned, perhaps with an open number of outlier columns.
        shapes: of a linear's tensors, by their name within it.
    """
    (columns,) = shapes.get("outlier_indices", (0,))
    return replace(
        scheme,
        outlier_columns=columns,
        rank=shapes.get("low_rank_right", (0,))[0],
        input_transform=len(shapes.get("input_transform", ())),
        output_transform=len(shapes.get("output_transform", ())),
    )


@cache
def stored_shapes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return meta tensors of the shapes and dtypes that a weight (out, in) has in a file.

    Outlier columns whose number is still open are left out.
    """
    codes, params = scheme.weights.empty(shape, dtype)
    (rows, columns), k, rank = shape, scheme.outlier_columns, scheme.rank
    return Quantized(
        scheme.weights,
        codes,
        params,
        shape,
        outliers=Outliers(_meta((k,), torch.int32), _meta((rows, k), dtype)) if k else None,
        low_rank=LowRank(_meta((rows, rank), dtype), _meta((rank, columns), dtype)) if rank else None,
        transforms=Transforms(
            _meta((columns,) * scheme.input_transform, dtype) if scheme.input_transform else None,
            _meta((rows,) * scheme.output_transform, dtype) if scheme.output_transform else None,
        ),
    ).to_tensors()


def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes on disk of a weight (out, in)."""
    return sum(t.numel() * t.element_size() for t in stored_shapes(scheme, shape, dtype).values())


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
