"""A quantized weight as named tensors in a file, and back: the layouts of compressed-tensors.

`pack-quantized`: weight_packed int32, weight_shape int64, and zero points packed along the rows.
`int-quantized` and `float-quantized`: weight in int8 or float8_e4m3fn. `nvfp4-pack-quantized` and
`mxfp4-pack-quantized`: weight_packed uint8, and in the former weight_global_scale. All: weight_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from laconic.formats import Format, Quantized, fit
from laconic.formats.fp4 import Fp4, pack_fp4, unpack_fp4
from laconic.formats.packing import pack, unpack
from laconic.formats.schemes import Scheme


def to_stored(q: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors to write for a weight, by their name within the linear."""
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


def from_stored(stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Quantized:
    """The inverse of `to_stored`. shape: (out, in) of the weight."""
    fmt, scale = scheme.weights, stored["weight_scale"]
    if isinstance(fmt, Fp4):
        packed = stored["weight_packed"]
        named = {name.removeprefix("weight_"): p for name, p in stored.items() if p is not packed}
        return Quantized(fmt, unpack_fp4(packed), named)
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
    params = fit(fmt, torch.empty(shape, device="meta"), dtype)
    return Quantized(fmt, torch.empty(shape, dtype=fmt.code_dtype, device="meta"), params)
