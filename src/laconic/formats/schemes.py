"""Schemes: the formats of weights and input activations of a linear (W4A16, W8A8, FP8, ...).

The presets are the names that the field uses; `scheme` varies one by the keys that a recipe may give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from laconic.formats.base import NO_PARAMS, Format, Params
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.scalar import ScalarFormat, as_scalar
from laconic.formats.tiling import AUTO_GROUP_SIZES, CHANNEL, TENSOR, TOKEN, Tiling


@dataclass(frozen=True)
class Activations:
    """Quantization of a linear's input.

    Attributes:
        format: Format of the codes.
        dynamic: True for parameters from each input itself, False for parameters from calibration; `local` takes only
            those of a whole tensor from calibration.
    """

    format: ScalarFormat
    dynamic: bool | Literal["local"]

    @property
    def calibrated(self) -> bool:
        """Whether calibration sets any parameter."""
        return self.dynamic is not True

    def calibrate(self, lo: Tensor, hi: Tensor, dtype: torch.dtype) -> Params:
        """Return the parameters that all inputs share, each (1,).

        Args:
            lo: 0-dim, the smallest value of all calibration inputs.
            hi: 0-dim, the largest value.
            dtype: Dtype in which they are stored.
        """
        lo, hi = lo.reshape(1), hi.reshape(1)
        match self.dynamic:
            case "local":
                return self.format.shared(lo, hi)
            case False:
                return self.format.from_range(lo, hi, dtype)
            case _:
                return NO_PARAMS


@dataclass(frozen=True)
class Scheme:
    """Storage and arithmetic of one linear.

    Attributes:
        name: Name of the preset that it comes from.
        weights: Format of the weight.
        input_activations: Quantization of the input; None for 16 bit.
        engine: The first engine that runs it; `laconic` for our own arithmetic, which is simulated.
        outlier_columns: Number of input columns in 16 bit beside the codes; None until calibration sets it.
        rank: Rank of the 16-bit product that is added to the codes.
        input_transform: Dimensions of the transform of input channels: 0 none, 1 a vector, 2 a matrix.
        output_transform: Dimensions of the transform of output channels.
        input_rotation: Number of input channels, where weights and inputs are rounded after these are rotated; 0
            otherwise.
    """

    name: str
    weights: Format
    input_activations: Activations | None = None
    engine: Literal["vllm", "laconic"] = "vllm"
    outlier_columns: int | None = 0
    rank: int = 0
    input_transform: int = 0
    output_transform: int = 0
    input_rotation: int = 0

    @property
    def title(self) -> str:
        """Name for people, side tensors included."""
        return (
            self.name
            + " + outliers" * (self.outlier_columns != 0)
            + f" + rank {self.rank}" * (self.rank > 0)
            + " + transforms" * bool(self.input_transform or self.output_transform)
            + " + rotated input" * bool(self.input_rotation)
        )

    @property
    def plain(self) -> Scheme:
        """Copy of the scheme without side tensors, whose sizes depend on the linear."""
        return replace(self, outlier_columns=0, rank=0, input_transform=0, output_transform=0, input_rotation=0)

    @property
    def native(self) -> bool:
        """Whether only our own code reads it (QLinear, and our plugin for vLLM)."""
        return self.engine == "laconic" or not self.weights.standard or self != self.plain

    @property
    def integer(self) -> bool:
        """Whether the product is computed as int8 by int8, outlier columns in a second product."""
        acts = self.input_activations
        return (
            acts is not None
            and _int8(self.weights, "channel", "tensor")
            and _int8(acts.format, "token", "tensor")
            and replace(self, outlier_columns=0) == self.plain
        )

    @property
    def simulated(self) -> bool:
        """Whether neither an engine nor our code has arithmetic for it, so that its speed means nothing."""
        return self.native and not self.integer

    @property
    def storage(self) -> str:
        """Name of the layout of its weights on disk."""
        return self.weights.storage


def _int8(fmt: Format, *strategies: str) -> bool:
    return fmt.integer_range == (-128, 127) and fmt.symmetric and as_scalar(fmt).tiling.strategy in strategies


def _ints(num_bits: int, tiling: Tiling, symmetric: bool = True, packed: bool = True) -> IntAffine:
    return IntAffine(num_bits, symmetric, tiling, packed=packed)


def _acts(num_bits: int) -> Activations:
    return Activations(IntAffine(num_bits, True, TOKEN, narrow=True), dynamic=True)


_G128 = Tiling("group", 128)

PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("W8A16", _ints(8, CHANNEL)),
        Scheme("W4A16", _ints(4, _G128)),
        Scheme("W4A16_ASYM", _ints(4, _G128, symmetric=False)),
        Scheme("W3A16", _ints(3, _G128)),
        Scheme("W2A16", _ints(2, _G128)),
        # Engines that multiply integers read a plain int8 weight.
        Scheme("W8A8", _ints(8, CHANNEL, packed=False), _acts(8)),
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
"""The schemes by name. A format is known to readers of config.json once a preset has it."""

# Presets whose activations are quantized for each input and in no other way.
_ALWAYS_DYNAMIC = ("FP8_BLOCK", "W4A8")


def known_formats() -> tuple[type[Format], ...]:
    """Return the kinds of format that presets have, for reading config.json."""
    return tuple(dict.fromkeys(type(s.weights) for s in PRESETS.values()))


def scheme(
    name: str,
    *,
    group_size: int | Literal["auto"] | None = None,
    symmetric: bool | None = None,
    strategy: str | None = None,
    dynamic: bool | None = None,
) -> Scheme:
    """Return a preset with the keys that a recipe may change.

    Args:
        name: Name of the preset.
        group_size: Columns that share a scale; -1 for one scale a channel; `auto` for the largest of
            `AUTO_GROUP_SIZES`, which `regroup` replaces by the size for a linear.
        symmetric: Whether the weights' grid has no zero point.
        strategy: Strategy of the weights: `tensor`, `channel` or `group`.
        dynamic: Whether activations are scaled by each input, or by calibration.

    Raises:
        ValueError: The name is unknown, or the preset cannot be varied so.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown scheme '{name}': choose one of {', '.join(PRESETS)}")
    base = PRESETS[name]
    if strategy not in (None, "tensor", "channel", "group"):
        raise ValueError(f"strategy '{strategy}' is not one of tensor, channel, group")
    if group_size == "auto":
        if strategy not in (None, "group"):
            raise ValueError(f"group_size auto contradicts strategy '{strategy}'")
        group_size = AUTO_GROUP_SIZES[0]
    weights = base.weights.vary(name, group_size=group_size, symmetric=symmetric, strategy=strategy)
    if not weights.symmetric and base.input_activations is not None:
        raise ValueError(f"{name} computes in integers and needs symmetric weights")
    return replace(base, weights=weights, input_activations=_vary_activations(base, dynamic))


def layout_depends_on_engine(scheme: Scheme) -> bool:
    """Return whether vLLM reads a scheme's codes packed on GPUs, and one a byte on CPUs.

    Args:
        scheme: Scheme of a linear.
    """
    acts = scheme.input_activations
    four_bits = scheme.weights.integer_range == (-8, 7)
    return four_bits and acts is not None and acts.format.num_bits == 8 and not scheme.native


def for_cpu(scheme: Scheme) -> Scheme:
    """Return a scheme as vLLM's CPU build reads it.

    Args:
        scheme: Scheme as vLLM's GPU kernels read it.
    """
    if not layout_depends_on_engine(scheme):
        return scheme
    return replace(scheme, weights=scheme.weights.unpacked())


def regroup(scheme: Scheme, tiling: Tiling) -> Scheme:
    """Return a scheme of groups with another tiling of its weights, as `group_size: auto` chooses it for a linear.

    Args:
        scheme: Scheme whose weights have a scalar format.
        tiling: Tiling of its weights.
    """
    weights = as_scalar(scheme.weights).retiled(tiling)
    assert weights is not None
    return replace(scheme, weights=weights)


def _vary_activations(base: Scheme, dynamic: bool | None) -> Activations | None:
    acts = base.input_activations
    if dynamic is None:
        return acts
    if acts is None:
        raise ValueError(f"{base.name} keeps activations in 16 bit: leave 'dynamic' out")
    if dynamic == acts.dynamic:
        return acts
    if base.name in _ALWAYS_DYNAMIC:
        raise ValueError(f"{base.name} has dynamic activations only")
    fmt = acts.format.retiled(TOKEN if dynamic else TENSOR)
    if fmt is None:
        raise ValueError(f"{base.name} quantizes activations in its own way: leave 'dynamic' out")
    return Activations(fmt, dynamic)
