"""FP8 (E4M3, finite, no infinities): w = scale * code, the code an 8-bit float of largest value 448."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats import NOTHING, Params
from laconic.formats.int_affine import storable
from laconic.formats.tiling import Tiling

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


@dataclass(frozen=True)
class Fp8:
    """float8_e4m3fn codes, one scale a tile, always symmetric."""

    tiling: Tiling

    @property
    def num_bits(self) -> int:
        return 8

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def headroom(self) -> float:
        return 1.0

    @property
    def widest(self) -> float:
        return 32.0

    @property
    def code_dtype(self) -> torch.dtype:
        return E4M3

    def shared(self, lo: Tensor, hi: Tensor) -> Params:
        return NOTHING

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NOTHING) -> Params:
        """The scale that puts the larger end of [lo, hi] on 448. An all-zero tile gets scale 1."""
        return {"scale": storable(torch.maximum(-lo, hi) / E4M3_MAX, dtype)}

    def unit(self, params: Params) -> Tensor:
        return params["scale"].float()

    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        return (tiles / params["scale"].float().unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float() * params["scale"].float().unsqueeze(-1)

    def snap_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        return self.decode_tiles(self.encode_tiles(tiles, params), params)
