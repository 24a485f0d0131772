"""A quantized weight as named tensors in a file, and back: the layouts of compressed-tensors.

`pack-quantized`: weight_packed int32, weight_shape int64, and zero points packed along the rows.
`int-quantized` and `float-quantized`: weight in int8 or float8_e4m3fn. All: weight_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from laconic.formats import Format, Quantized
from laconic.formats.packing import pack, unpack
from laconic.formats.schemes import Scheme


def to_stored(q: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors to write for a weight, by their name within the linear."""
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


def from_stored(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Quantized:
    """The inverse of `to_stored`. shape: (out, in) of the weight."""
    fmt, scale = scheme.weights, stored["weight_scale"]
    if scheme.storage != "pack-quantized":
        return Quantized(fmt, stored["weight"], {"scale": scale})
    params = {"scale": scale}
    if not fmt.symmetric:
        rows = fmt.tiling.param_shape(shape)[0]
        params["zero_point"] = unpack(stored["weight_zero_point"].T.contiguous(), fmt.num_bits, rows).T
    return Quantized(fmt, unpack(stored["weight_packed"], fmt.num_bits, shape[1]), params)


@cache
def stored_shapes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Meta tensors of the shapes and dtypes that `to_stored` writes for a weight of this shape."""
    return to_stored(_blank(scheme.weights, shape, dtype), scheme)


def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes on disk of a weight of this shape."""
    return sum(t.numel() * t.element_size() for t in stored_shapes(scheme, shape, dtype).values())


def _blank(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> Quantized:
    param_shape = fmt.tiling.param_shape(shape)
    params = {"scale": torch.empty(param_shape, dtype=dtype, device="meta")}
    if not fmt.symmetric:
        params["zero_point"] = torch.empty(param_shape, dtype=torch.int8, device="meta")
    return Quantized(fmt, torch.empty(shape, dtype=fmt.code_dtype, device="meta"), params)
