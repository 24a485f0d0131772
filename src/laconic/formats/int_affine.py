"""Integer affine grids of 2 to 8 bits: w = scale * (code - zero_point).

Codes are signed, in [-2^(b-1), 2^(b-1) - 1], as compressed-tensors stores them. A symmetric grid has no zero point, and
one more code below zero than above; at 4 bits and fewer that code is worth having, so the scale of a range that reaches
further up than down is negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats import NOTHING, Params
from laconic.formats.tiling import Tiling


@dataclass(frozen=True)
class IntAffine:
    """num_bits: 2..8. narrow: a symmetric grid's highest code is absmax, which is how engines quantize activations; the
    lowest is left to what lies beyond the range that was seen."""

    num_bits: int
    symmetric: bool
    tiling: Tiling
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"integer formats have 2 to 8 bits, not {self.num_bits}")

    @property
    def headroom(self) -> float:
        return 1.0

    @property
    def widest(self) -> float:
        return 1.0

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def signed(self) -> bool:
        """Whether scales may be negative."""
        return self.symmetric and not self.narrow and self.num_bits <= 4

    def shared(self, lo: Tensor, hi: Tensor) -> Params:
        return NOTHING

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NOTHING) -> Params:
        """The grid over [lo, hi], widened to hold zero. An all-zero tile gets scale 1."""
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if self.symmetric:
            steps = self.qmax if self.narrow else -self.qmin if self.signed else (self.qmax - self.qmin) / 2
            scale = storable(torch.maximum(-lo, hi) / steps, dtype)
            return {"scale": torch.where(hi > -lo, -scale, scale) if self.signed else scale}
        scale = storable((hi - lo) / (self.qmax - self.qmin), dtype)
        zero_point = (self.qmin - lo / scale.float()).round_().clamp_(self.qmin, self.qmax)
        return {"scale": scale, "zero_point": zero_point.to(torch.int8)}

    def unit(self, params: Params) -> Tensor:
        return params["scale"].float()

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
        # The same numbers as by way of codes, which float32 holds exactly, without two conversions.
        scale = params["scale"].float().unsqueeze(-1)
        values = (tiles / scale).round_()
        if self.symmetric:
            return values.clamp_(self.qmin, self.qmax).mul_(scale)
        zero_point = params["zero_point"].float().unsqueeze(-1)
        return values.add_(zero_point).clamp_(self.qmin, self.qmax).sub_(zero_point).mul_(scale)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in its stored dtype: never zero or infinite there, nor too small for float32 to divide by.

    Half precision's subnormal numbers are used: the scales of small weights at 8 bits reach down to them.
    """
    info = torch.finfo(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(min=max(info.tiny * info.eps, torch.finfo(torch.float32).tiny), max=info.max).to(dtype)
