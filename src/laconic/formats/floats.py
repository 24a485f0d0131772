"""FP8 (E4M3, finite, no infinities): w = scale * code, the code an 8-bit float of largest value 448."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from laconic.formats.base import NO_PARAMS, Params
from laconic.formats.int_affine import storable
from laconic.formats.scalar import ScalarFormat, tiling_from_config, vary_tiling
from laconic.formats.tiling import Tiling

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


@dataclass(frozen=True)
class Fp8(ScalarFormat):
    """float8_e4m3fn codes, one scale a tile, always symmetric."""

    tiling: Tiling

    @property
    def title(self) -> str:
        return "FP8 E4M3"

    @property
    def num_bits(self) -> int:
        return 8

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def storage(self) -> str:
        return "float-quantized"

    @property
    def widest_step(self) -> float:
        return 32.0

    @property
    def code_dtype(self) -> torch.dtype:
        return E4M3

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NO_PARAMS) -> Params:
        """Return the scale that puts the larger end of [lo, hi] on 448. An all-zero tile gets scale 1."""
        return {"scale": storable(torch.maximum(-lo, hi) / E4M3_MAX, dtype)}

    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        return (tiles / params["scale"].float().unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)

    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float() * params["scale"].float().unsqueeze(-1)

    def retiled(self, tiling: Tiling) -> Fp8:
        return replace(self, tiling=tiling)

    def to_tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight_scale": params["scale"], "weight": codes}

    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        return tensors["weight"], {"scale": tensors["weight_scale"]}

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"type": "float"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        if config["type"] != "float" or config["num_bits"] == 4:
            return None
        if config["num_bits"] != 8:
            raise ValueError(f"cannot read {config['num_bits']}-bit floats; open the model with transformers or vLLM")
        return cls(tiling_from_config(config))

    def vary(self, preset: str, *, group_size: int | None, symmetric: bool | None, strategy: str | None) -> Fp8:
        tiling = vary_tiling(self.tiling, preset, group_size, strategy, grouped=False)
        if self.tiling.block_structure and tiling != self.tiling:
            height, width = self.tiling.block_structure
            raise ValueError(f"{preset} is {height} x {width} blocks: use FP8 or FP8_DYNAMIC for another strategy")
        if symmetric is False:
            raise ValueError(f"{preset} is always symmetric")
        return Fp8(tiling)
