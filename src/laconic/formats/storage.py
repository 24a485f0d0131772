"""Shapes and sizes of a quantized weight in a file, for a scheme.

Codes and parameters have the names that their format gives them (`Format.to_tensors`). The 16-bit side tensors beside
them have Laconic's names: outlier_indices (k,) int32, outlier_weight (out, k); low_rank_left (out, r), low_rank_right
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
        scheme: Planned scheme, whose number of outlier columns may be open.
        shapes: Shapes of a linear's tensors, by their name within it.
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
    """Return a weight's tensors in a file, by their name within the linear, on the meta device.

    Outlier columns whose number is still open are left out.

    Args:
        scheme: Scheme of the linear.
        shape: Shape (out, in) of the weight.
        dtype: Dtype of the model.

    Raises:
        ValueError: The scheme's group size does not divide `in`.
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
    """Return the bytes on disk of a weight.

    Args:
        scheme: Scheme of the linear; outlier columns whose number is open are not counted.
        shape: Shape (out, in) of the weight.
        dtype: Dtype of the model.

    Raises:
        ValueError: The scheme's group size does not divide `in`.
    """
    return sum(t.numel() * t.element_size() for t in stored_shapes(scheme, shape, dtype).values())


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
