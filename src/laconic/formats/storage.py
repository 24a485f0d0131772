"""A quantized weight as named tensors in a file, and back: the layouts of compressed-tensors.

`pack-quantized`: weight_packed int32, weight_shape int64, and zero points packed along the rows.
`int-quantized` and `float-quantized`: weight in int8 or float8_e4m3fn. `nvfp4-pack-quantized` and
`mxfp4-pack-quantized`: weight_packed uint8, and in the former weight_global_scale. All: weight_scale. Beside them in 16
bit, under names of our own: outlier_indices (k,) int32, outlier_weight (out, k); low_rank_left (out, r),
low_rank_right (r, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from laconic.formats import Format, LowRank, Outliers, Quantized, fit
from laconic.formats.fp4 import Fp4, pack_fp4, unpack_fp4
from laconic.formats.packing import pack, unpack
from laconic.formats.schemes import Scheme


def to_stored(q: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors to write for a weight, by their name within the linear."""
    stored = _stored_codes(q, scheme)
    if q.outliers is not None:
        stored |= {"outlier_indices": q.outliers.indices, "outlier_weight": q.outliers.weight}
    if q.low_rank is not None:
        stored |= {"low_rank_left": q.low_rank.left, "low_rank_right": q.low_rank.right}
    return stored


def from_stored(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Quantized:
    """The inverse of `to_stored`. shape: (out, in) of the weight."""
    q = _codes_from_stored(stored, scheme, shape)
    if "outlier_indices" in stored:
        q = replace(q, outliers=Outliers(stored["outlier_indices"], stored["outlier_weight"]))
    if "low_rank_left" in stored:
        q = replace(q, low_rank=LowRank(stored["low_rank_left"], stored["low_rank_right"]))
    return q


def as_stored(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> Scheme:
    """The scheme with the outlier columns and the rank that a finished file has. shapes: of a linear's tensors, by
    their name within it."""
    (columns,) = shapes.get("outlier_indices", (0,))
    rank = shapes.get("low_rank_right", (0,))[0]
    return replace(scheme, outlier_columns=columns, rank=rank)


def _stored_codes(q: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    if isinstance(q.format, Fp4):
        return {"weight_packed": pack_fp4(q.codes)} | {f"weight_{name}": p for name, p in q.params.items()}
    bits = q.format.num_bits
    stored = {"weight_scale": q.params["scale"]}
    if scheme.storage == "pack-quantized":
        stored["weight_packed"] = pack(q.codes, bits)
        stored["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
        if not q.format.symmetric:
            stored["weight_zero_point"] = pack(q.params["zero_point"].T, bits).T.contiguous()
    else:
        stored["weight"] = q.codes
    return stored


def _codes_from_stored(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Quantized:
    fmt, scale = scheme.weights, stored["weight_scale"]
    if isinstance(fmt, Fp4):
        own = {n.removeprefix("weight_"): p for n, p in stored.items() if n.startswith("weight_")}
        return Quantized(fmt, unpack_fp4(own.pop("packed")), own)
    if scheme.storage != "pack-quantized":
        return Quantized(fmt, stored["weight"], {"scale": scale})
    params = {"scale": scale}
    if not fmt.symmetric:
        rows = fmt.tiling.param_shape(shape)[0]
        params["zero_point"] = unpack(stored["weight_zero_point"].T.contiguous(), fmt.num_bits, rows).T
    return Quantized(fmt, unpack(stored["weight_packed"], fmt.num_bits, shape[1]), params)


@cache
def stored_shapes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Meta tensors of the shapes and dtypes that `to_stored` writes for a weight of this shape. Outlier columns that
    are not counted yet are left out."""
    return to_stored(_blank(scheme, shape, dtype), scheme)


def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes on disk of a weight of this shape."""
    return sum(t.numel() * t.element_size() for t in stored_shapes(scheme, shape, dtype).values())


def _blank(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Quantized:
    q, (rows, columns), k, rank = _blank_codes(scheme.weights, shape, dtype), shape, scheme.outlier_columns, scheme.rank
    if k:
        q = replace(q, outliers=Outliers(_meta((k,), torch.int32), _meta((rows, k), dtype)))
    if rank:
        q = replace(q, low_rank=LowRank(_meta((rows, rank), dtype), _meta((rank, columns), dtype)))
    return q


def _blank_codes(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> Quantized:
    params = fit(fmt, _meta(shape, torch.float32), dtype)
    return Quantized(fmt, _meta(shape, fmt.code_dtype), params)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
