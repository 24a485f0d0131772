"""Integer affine grids of 2 to 8 bits: w = scale * (code - zero_point).

Codes are signed, in [-2^(b-1), 2^(b-1) - 1], as compressed-tensors stores them. A symmetric grid has no zero point, and
one more code below zero than above. At 4 bits and fewer that extra code lowers the error, so the scale of a range whose
upper end is the larger is negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from laconic.formats.base import NO_PARAMS, Params
from laconic.formats.packing import pack, unpack
from laconic.formats.scalar import ScalarFormat, tiling_from_config, vary_tiling
from laconic.formats.tiling import Tiling


@dataclass(frozen=True)
class IntAffine(ScalarFormat):
    """An evenly spaced grid.

    Attributes:
        num_bits: Bits of a code, 2 to 8.
        symmetric: Whether there is no zero point.
        tiling: Sets of weights that share a scale.
        narrow: Whether a symmetric grid's highest code is the largest magnitude, which is how engines quantize
            activations; the lowest code is left to values beyond the observed range.
        packed: Whether codes are written densely in int32 words (`pack-quantized`), or one a byte (`int-quantized`),
            as kernels that multiply integers read them.
    """

    num_bits: int
    symmetric: bool
    tiling: Tiling
    narrow: bool = False
    packed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"integer formats have 2 to 8 bits, not {self.num_bits}")

    @property
    def title(self) -> str:
        return f"int{self.num_bits}"

    @property
    def granularity(self) -> str:
        return f"{'symmetric' if self.symmetric else 'asymmetric'}, {super().granularity}"

    @property
    def storage(self) -> str:
        return "pack-quantized" if self.packed else "int-quantized"

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def word_codes(self) -> int:
        return math.lcm(self.num_bits, 32) // self.num_bits if self.packed else 1

    @property
    def readable(self) -> bool:
        return self.packed or self.symmetric

    @property
    def table(self) -> bool:
        # Codes whose bits divide a word: vLLM's kernel finds those of a row.
        return self.packed and self.symmetric and 32 % self.num_bits == 0

    @property
    def regroupable(self) -> bool:
        # Kernels of int8 by int8 take one scale a row or one alone.
        return self.packed or self.num_bits < 8

    def unpacked(self) -> IntAffine:
        return replace(self, packed=False)

    @property
    def integer_range(self) -> tuple[int, int]:
        return self.qmin, self.qmax

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def signed_scale(self) -> bool:
        """Whether scales may be negative."""
        return self.symmetric and not self.narrow and self.num_bits <= 4

    def for_activations(self) -> IntAffine:
        return replace(self, narrow=self.symmetric)

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NO_PARAMS) -> Params:
        """Return the grid over [lo, hi], widened to hold zero. An all-zero tile gets scale 1."""
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if self.symmetric:
            steps = self.qmax if self.narrow else -self.qmin if self.signed_scale else (self.qmax - self.qmin) / 2
            scale = storable(torch.maximum(-lo, hi) / steps, dtype)
            return {"scale": torch.where(hi > -lo, -scale, scale) if self.signed_scale else scale}
        scale = storable((hi - lo) / (self.qmax - self.qmin), dtype)
        zero_point = (self.qmin - lo / scale.float()).round_().clamp_(self.qmin, self.qmax)
        return {"scale": scale, "zero_point": zero_point.to(torch.int8)}

    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        codes = tiles / params["scale"].float().unsqueeze(-1)
        codes = codes.round_()
        if not self.symmetric:
            codes += params["zero_point"].float().unsqueeze(-1)
        return codes.clamp_(self.qmin, self.qmax).to(torch.int8)

    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        values = codes.float()
        if not self.symmetric:
            values = values - params["zero_point"].float().unsqueeze(-1)
        return values * params["scale"].float().unsqueeze(-1)

    def snap_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        # The same numbers as through codes, which float32 holds exactly, without two conversions.
        scale = params["scale"].float().unsqueeze(-1)
        values = (tiles / scale).round_()
        if self.symmetric:
            return values.clamp_(self.qmin, self.qmax).mul_(scale)
        zero_point = params["zero_point"].float().unsqueeze(-1)
        return values.add_(zero_point).clamp_(self.qmin, self.qmax).sub_(zero_point).mul_(scale)

    def retiled(self, tiling: Tiling) -> IntAffine:
        return replace(self, tiling=tiling)

    def to_tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Return `weight_packed` int32, `weight_shape` int64 and packed zero points; or `weight` int8. And the scale.

        Zero points are packed along the rows.
        """
        tensors = {"weight_scale": params["scale"]}
        if not self.packed:
            return tensors | {"weight": codes}
        tensors["weight_packed"] = pack(codes, self.num_bits)
        tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if not self.symmetric:
            tensors["weight_zero_point"] = pack(params["zero_point"].T, self.num_bits).T.contiguous()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        params = {"scale": tensors["weight_scale"]}
        if not self.packed:
            return tensors["weight"], params
        if not self.symmetric:
            rows = self.tiling.param_shape(shape)[0]
            params["zero_point"] = unpack(tensors["weight_zero_point"].T.contiguous(), self.num_bits, rows).T
        return unpack(tensors["weight_packed"], self.num_bits, shape[1]), params

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"type": "int"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        if config["type"] != "int":
            return None
        packed = config.get("format") != "int-quantized"
        return cls(config["num_bits"], config["symmetric"], tiling_from_config(config), packed=packed)

    def vary(self, preset: str, *, group_size: int | None, symmetric: bool | None, strategy: str | None) -> IntAffine:
        tiling = vary_tiling(self.tiling, preset, group_size, strategy, grouped=self.regroupable)
        return replace(self, tiling=tiling, symmetric=self.symmetric if symmetric is None else symmetric)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their stored dtype: never to zero or infinity, nor to what float32 cannot divide by.

    Subnormal numbers of half precision are used: the scales of small weights at 8 bits reach down to them.

    Args:
        scale: Scales, any shape and float dtype; those that are not positive, or NaN, become 1.
        dtype: Float dtype in which they are stored.

    Returns:
        Scales in that dtype, in the shape of `scale`.
    """
    info = torch.finfo(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(min=max(info.tiny * info.eps, torch.finfo(torch.float32).tiny), max=info.max).to(dtype)
