"""FP4 (E2M1: a sign, two bits of exponent, one of mantissa) in small groups of one scale: MXFP4 and NVFP4.

A code is the four bits as they are: 0 to 7 stand for 0, .5, 1, 1.5, 2, 3, 4, 6, and 8 to 15 for the same below zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from laconic.formats.base import NO_PARAMS, Params
from laconic.formats.floats import E4M3, E4M3_MAX
from laconic.formats.int_affine import storable
from laconic.formats.scalar import ScalarFormat
from laconic.formats.tiling import Tiling

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0

_GROUPS_OF_16, _GROUPS_OF_32 = Tiling("group", 16), Tiling("group", 32)


def encode_e2m1(x: Tensor) -> Tensor:
    """Return the nearest code of each value; half way, the one whose mantissa is even; past 6, that of 6.

    Args:
        x: Values divided by their scale, any shape and float dtype.

    Returns:
        Codes 0 to 15, uint8, in the shape of x.
    """
    m = x.abs()
    # Steps are .5 up to 2, 1 up to 4, 2 up to 6, and each stretch begins on an even code: count the steps in each.
    steps = (2 * m).clamp_(max=4).round_()
    steps += m.clamp(2, 4).round_()
    steps += m.clamp_(4, 6).mul_(0.5).round_()
    return steps.sub_(4).to(torch.uint8).add_(torch.signbit(x), alpha=8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the value of each code.

    Args:
        codes: Codes 0 to 15, any shape and integer dtype.

    Returns:
        Values in units of the scale, float32, in the shape of the codes.
    """
    return _values(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor((*E2M1, *(-v for v in E2M1)), device=device)


def pack_fp4(codes: Tensor) -> Tensor:
    """Pack two codes into a byte, the first of them in its low half.

    Args:
        codes: (rows, n) uint8, codes 0 to 15; n is even.

    Returns:
        (rows, n / 2) uint8.
    """
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """Unpack codes: the inverse of `pack_fp4`.

    Args:
        packed: (rows, n / 2) uint8.

    Returns:
        (rows, n) uint8, codes 0 to 15.
    """
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


@dataclass(frozen=True)
class Fp4(ScalarFormat):
    """w = step * value of the code, one step a tile."""

    tiling: Tiling = _GROUPS_OF_16

    @property
    def num_bits(self) -> int:
        return 4

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def storage(self) -> str:
        return f"{self.title.lower()}-pack-quantized"

    @property
    def granularity(self) -> str:
        return f"group {self.tiling.group_size}"

    @property
    def widest_step(self) -> float:
        return 2.0

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    @abstractmethod
    def unit(self, params: Params) -> Tensor: ...

    def encode_tiles(self, tiles: Tensor, params: Params) -> Tensor:
        return encode_e2m1(tiles / self.unit(params).unsqueeze(-1))

    def decode_tiles(self, codes: Tensor, params: Params) -> Tensor:
        return decode_e2m1(codes) * self.unit(params).unsqueeze(-1)

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        size = self.tiling.group_size
        assert size is not None
        if shape[1] % size:
            raise ValueError(
                f"{self.title} is groups of {size}, which do not divide the {shape[1]} inputs of {name}; "
                "use another scheme there, or ignore it"
            )

    def to_tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight_packed": pack_fp4(codes)} | {f"weight_{name}": p for name, p in params.items()}

    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Params]:
        params = {n.removeprefix("weight_"): t for n, t in tensors.items() if n.startswith("weight_")}
        return unpack_fp4(params.pop("packed")), params

    def to_config(self) -> dict[str, Any]:
        config = super().to_config() | {"type": "float", "scale_dtype": self.scale_dtype}
        return config | {"strategy": self.config_strategy}

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """Dtype of scales in the file, which config.json names."""

    @property
    def config_strategy(self) -> str:
        """The word of compressed-tensors for how scales are shared."""
        return "group"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        if config["type"] != "float" or config["num_bits"] != 4:
            return None
        default = cls()
        if config["strategy"] != default.config_strategy:
            return None
        scale_dtype = config.get("scale_dtype")
        # Written by name, and read by compressed-tensors as a dtype.
        same_dtype = scale_dtype is None or str(scale_dtype) == str(default.scale_dtype)
        same_size = config.get("group_size") == default.tiling.group_size
        return default if same_size and same_dtype and config["symmetric"] else None

    def vary(self, preset: str, *, group_size: int | None, symmetric: bool | None, strategy: str | None) -> Fp4:
        size = self.tiling.group_size
        if group_size not in (None, size) or strategy not in (None, "group"):
            raise ValueError(f"{preset} is groups of {size}: leave group_size and strategy out")
        if symmetric is False:
            raise ValueError(f"{preset} is always symmetric")
        return self


@dataclass(frozen=True)
class MxFp4(Fp4):
    """OCP Microscaling (MX) v1.0: groups of 32 whose scale is a power of two, stored as its exponent + 127 (E8M0)."""

    tiling: Tiling = _GROUPS_OF_32

    @property
    def title(self) -> str:
        return "MXFP4"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8

    def unit(self, params: Params) -> Tensor:
        return params["scale"].view(torch.float8_e8m0fnu).float()

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NO_PARAMS) -> Params:
        """Return the smallest power of two under which the larger end of [lo, hi] rounds to 6 and is not clipped.

        That is, under which it stays below 7. An all-zero tile gets scale 1.
        """
        absmax = torch.maximum(-lo, hi).float()
        # absmax = mantissa 2^exponent with a mantissa of 1/2 to 1, so that 2^(exponent - 3) leaves it at 4 to 8.
        mantissa, exponent = torch.frexp(absmax)
        exponent = torch.where(absmax > 0, exponent - 3 + (mantissa >= 7 / 8).int(), 0)
        return {"scale": (exponent.clamp(-126, 127) + 127).to(torch.uint8)}


@dataclass(frozen=True)
class NvFp4(Fp4):
    """NVIDIA's FP4: groups of 16 whose scale is an FP8 (E4M3), and one float32 `global_scale` a tensor.

    The global scale spreads the scales of groups over the range of FP8: step = scale / global_scale.
    """

    @property
    def title(self) -> str:
        return "NVFP4"

    @property
    def scale_dtype(self) -> torch.dtype:
        return E4M3

    @property
    def config_strategy(self) -> str:
        # Groups with a scale of the whole tensor beside theirs.
        return "tensor_group"

    @property
    def headroom(self) -> float:
        # The largest value on 4 rather than 6 makes the steps below it finer (Four Over Six, arXiv 2512.02010).
        return E2M1_MAX / 4

    def unit(self, params: Params) -> Tensor:
        return params["scale"].float() / params["global_scale"]

    def shared(self, lo: Tensor, hi: Tensor) -> Params:
        """Return the global scale that gives the tile of the largest value the largest scale, 448. All zeros get 1."""
        absmax = torch.maximum(-lo, hi).float().amax().reshape(1)
        largest = torch.finfo(torch.float32).max
        return {"global_scale": torch.where(absmax > 0, (E4M3_MAX * E2M1_MAX / absmax).clamp(max=largest), 1.0)}

    def from_range(self, lo: Tensor, hi: Tensor, dtype: torch.dtype, shared: Params = NO_PARAMS) -> Params:
        """Return the FP8 scale that puts the larger end of [lo, hi] nearest to 6. An all-zero tile gets scale 1."""
        absmax = torch.maximum(-lo, hi).float()
        return {"scale": storable(absmax / E2M1_MAX * shared["global_scale"], E4M3)}
