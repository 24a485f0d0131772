"""A scheme says in which format weights and input activations are kept: W4A16, W8A8, FP8, ...

It is data. The presets are the names the field uses; `scheme` varies one by the keys a recipe may give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from laconic.formats import NOTHING, Format, Params
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import Fp4, MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling

CHANNEL = Tiling("channel")
TOKEN = Tiling("token")
TENSOR = Tiling("tensor")

Storage = Literal["pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"]


@dataclass(frozen=True)
class Activations:
    """How a linear's input is rounded. dynamic: parameters from each input itself; otherwise from calibration; `local`
    takes from calibration those that a whole tensor has one of."""

    format: Format
    dynamic: bool | Literal["local"]

    @property
    def calibrated(self) -> bool:
        """Whether calibration must say anything."""
        return self.dynamic is not True

    def calibrate(self, lo: Tensor, hi: Tensor, dtype: torch.dtype) -> Params:
        """The parameters that stay as they are for every input, each (1,). lo, hi: of all inputs seen, 0-dim."""
        lo, hi = lo.reshape(1), hi.reshape(1)
        match self.dynamic:
            case "local":
                return self.format.shared(lo, hi)
            case False:
                return self.format.from_range(lo, hi, dtype)
            case _:
                return NOTHING


@dataclass(frozen=True)
class Scheme:
    """name: the preset it came from. engine: whether a serving engine runs it, or only our own QLinear, which
    simulates the arithmetic. outlier_columns: input columns kept in 16 bit beside the codes, None when only calibration
    will tell how many. rank: of the 16-bit product added to the codes."""

    name: str
    weights: Format
    input_activations: Activations | None = None
    engine: Literal["vllm", "transformers", "laconic"] = "vllm"
    outlier_columns: int | None = 0
    rank: int = 0

    @property
    def title(self) -> str:
        """The name, with what is kept beside the codes."""
        return self.name + " + outliers" * (self.outlier_columns != 0) + f" + rank {self.rank}" * (self.rank > 0)

    @property
    def native(self) -> bool:
        """Whether only our own code reads it (QLinear, and our plugin for vLLM)."""
        return self.engine == "laconic" or self.outlier_columns != 0 or self.rank > 0

    @property
    def integer(self) -> bool:
        """Whether the product is one of int8 by int8 that we compute as such, outlier columns in a second product."""
        acts = self.input_activations
        return (
            _int8(self.weights, "channel", "tensor")
            and acts is not None
            and _int8(acts.format, "token", "tensor")
            and self.rank == 0
        )

    @property
    def simulated(self) -> bool:
        """Whether nobody, neither an engine nor we, has arithmetic for it, so that any speed it shows is not real."""
        return self.native and not self.integer

    @property
    def storage(self) -> Storage:
        """The compressed-tensors layout of its weights on disk."""
        match self.weights:
            case Fp8():
                return "float-quantized"
            case NvFp4():
                return "nvfp4-pack-quantized"
            case MxFp4():
                return "mxfp4-pack-quantized"
        # Engines that compute in integers want a plain int8 weight; the others unpack words themselves.
        return "int-quantized" if self.input_activations and self.engine != "laconic" else "pack-quantized"


def _int8(fmt: Format, *strategies: str) -> bool:
    ints = isinstance(fmt, IntAffine) and fmt.num_bits == 8 and fmt.symmetric
    return ints and fmt.tiling.strategy in strategies


def _ints(num_bits: int, tiling: Tiling, symmetric: bool = True) -> IntAffine:
    return IntAffine(num_bits, symmetric, tiling)


def _acts(num_bits: int) -> Activations:
    return Activations(IntAffine(num_bits, True, TOKEN, narrow=True), dynamic=True)


_G128 = Tiling("group", 128)

PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("W8A16", _ints(8, CHANNEL)),
        Scheme("W4A16", _ints(4, _G128)),
        Scheme("W4A16_ASYM", _ints(4, _G128, symmetric=False)),
        Scheme("W3A16", _ints(3, _G128), engine="transformers"),
        Scheme("W2A16", _ints(2, _G128), engine="transformers"),
        Scheme("W8A8", _ints(8, CHANNEL), _acts(8)),
        Scheme("W4A8", _ints(4, _G128), _acts(8)),
        Scheme("W7A7", _ints(7, CHANNEL), _acts(7), engine="laconic"),
        Scheme("W6A6", _ints(6, CHANNEL), _acts(6), engine="laconic"),
        Scheme("W4A6", _ints(4, _G128), _acts(6), engine="laconic"),
        Scheme("W4A4", _ints(4, _G128), _acts(4), engine="laconic"),
        Scheme("FP8", Fp8(TENSOR), Activations(Fp8(TENSOR), dynamic=False)),
        Scheme("FP8_DYNAMIC", Fp8(CHANNEL), Activations(Fp8(TOKEN), dynamic=True)),
        Scheme(
            "FP8_BLOCK",
            Fp8(Tiling("block", block_structure=(128, 128))),
            Activations(Fp8(Tiling("group", 128)), dynamic=True),
        ),
        Scheme("NVFP4A16", NvFp4()),
        Scheme("NVFP4", NvFp4(), Activations(NvFp4(), dynamic="local")),
        Scheme("MXFP4A16", MxFp4()),
        Scheme("MXFP4", MxFp4(), Activations(MxFp4(), dynamic=True)),
    )
}


def scheme(
    name: str,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    strategy: str | None = None,
    dynamic: bool | None = None,
) -> Scheme:
    """The preset `name`, varied: group_size -1 is one scale a channel; `strategy` is the weights' (tensor,
    channel or group); `dynamic` says whether activations are scaled by each input or by calibration.

    Raises: ValueError for an unknown name or a variation the preset cannot take.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown scheme '{name}': choose one of {', '.join(PRESETS)}")
    base = PRESETS[name]
    if strategy not in (None, "tensor", "channel", "group"):
        raise ValueError(f"strategy '{strategy}' is not one of tensor, channel, group")
    return replace(
        base,
        weights=_vary_weights(base, group_size, symmetric, strategy),
        input_activations=_vary_activations(base, dynamic),
    )


def _vary_weights(base: Scheme, group_size: int | None, symmetric: bool | None, strategy: str | None) -> Format:
    weights, tiling = base.weights, base.weights.tiling
    if isinstance(weights, Fp4):
        if group_size not in (None, tiling.group_size) or strategy not in (None, "group"):
            raise ValueError(f"{base.name} is groups of {tiling.group_size}: leave group_size and strategy out")
        if symmetric is False:
            raise ValueError(f"{base.name} is always symmetric")
        return weights
    # These formats have a scale a row or one alone, and nothing between.
    ungrouped = isinstance(weights, Fp8) or base.name == "W8A8"
    if group_size is not None and strategy not in (None, "channel" if group_size == -1 else "group"):
        raise ValueError(f"group_size {group_size} contradicts strategy '{strategy}'")
    if group_size == -1 or strategy in ("tensor", "channel"):
        tiling = TENSOR if strategy == "tensor" else CHANNEL
    elif group_size is not None or strategy == "group":
        if ungrouped:
            raise ValueError(f"{base.name} has no groups: leave group_size out")
        tiling = Tiling("group", group_size if group_size is not None else 128)
    if tiling.strategy == "tensor" and not ungrouped:
        raise ValueError(f"{base.name} is stored by channel or by group: strategy 'tensor' is for W8A8 and FP8")
    if base.name == "FP8_BLOCK" and tiling.strategy != "block":
        raise ValueError("FP8_BLOCK is 128 x 128 blocks: use FP8 or FP8_DYNAMIC for another strategy")
    if isinstance(weights, Fp8):
        if symmetric is False:
            raise ValueError(f"{base.name} is always symmetric")
        return Fp8(tiling)
    assert isinstance(weights, IntAffine)
    if symmetric is False and base.input_activations is not None:
        raise ValueError(f"{base.name} computes in integers and needs symmetric weights")
    return replace(weights, tiling=tiling, symmetric=weights.symmetric if symmetric is None else symmetric)


def _vary_activations(base: Scheme, dynamic: bool | None) -> Activations | None:
    acts = base.input_activations
    if dynamic is None:
        return acts
    if acts is None:
        raise ValueError(f"{base.name} keeps activations in 16 bit: leave 'dynamic' out")
    if dynamic == acts.dynamic:
        return acts
    if isinstance(acts.format, Fp4):
        raise ValueError(f"{base.name} rounds activations in its own way: leave 'dynamic' out")
    if base.name in ("FP8_BLOCK", "W4A8"):
        raise ValueError(f"{base.name} has dynamic activations only")
    assert isinstance(acts.format, Fp8 | IntAffine)
    return Activations(replace(acts.format, tiling=TOKEN if dynamic else TENSOR), dynamic)
