"""Storage of keys and values in a cache: a format for keys and one for values, of each group of heads.

A tensor x_BHTC is stored as a mapping of tensors that all have the batch first and run along time in their third
dimension (in tokens, or in groups of tokens), so that a cache can join, cut, select and count them whatever they are.

Axes: B sequences, H key-value heads, T tokens, C channels, G groups of numbers that share a range, K outliers of a
token, X bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.kv.planes import pack_planes, packed_size, unpack_planes

Stored = dict[str, Tensor]
"""Tensors that `encode_kv` stores, by name."""
StaticParams = Mapping[str, Tensor]
"""Parameters from calibration, float32: `scale` and `offset`, each broadcasting over (H, C); `levels` (L,)."""

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class KvFormat:
    """A format of keys, or of values.

    Attributes:
        num_bits: Bits of a code; 16 stores numbers as they are.
        axis: Numbers that share a range: `token`, neighbouring channels of one token; `channel`, one channel of
            neighbouring tokens.
        group_size: Size of a group of numbers that share a range; None for a static range from calibration.
        datatype: `int`, evenly spaced codes; `table`, levels in [-1, 1] chosen by calibration; `float`, FP8 E4M3.
        symmetric: Whether ranges are symmetric about zero, and stored without an offset.
        outlier_ratio: Share of a token's channels, the farthest from the middle of their range, that are stored in 16
            bit beside the codes.
    """

    num_bits: int = 4
    axis: Literal["token", "channel"] = "token"
    group_size: int | None = 32
    datatype: Literal["int", "table", "float"] = "int"
    symmetric: bool = False
    outlier_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.num_bits not in BITS:
            raise ValueError(f"a cache stores 1 to 8 bits, or 16, not {self.num_bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")
        if not 0 <= self.outlier_ratio < 0.5:
            raise ValueError(f"outlier_ratio must be in [0, 0.5), not {self.outlier_ratio}")
        if self.datatype == "float" and self.num_bits not in (8, 16):
            raise ValueError(f"floats of a cache have 8 bits, not {self.num_bits}")

    @property
    def tokens_at_once(self) -> int:
        """Number of tokens that are encoded together."""
        return self.group_size if self.axis == "channel" and self.group_size and self.num_bits < 16 else 1

    @property
    def calibrated(self) -> bool:
        """Whether the format needs static parameters from calibration."""
        return self.num_bits < 16 and (self.group_size is None or self.datatype == "table")

    @property
    def max_code(self) -> float:
        """Largest code on either side of zero, to which a range is scaled."""
        if self.datatype == "float":
            return float(torch.finfo(_FP8).max)
        return 1.0 if self.datatype == "table" else 2 ** (self.num_bits - 1) - 1

    def outliers(self, channels: int) -> int:
        """Return the number of a token's channels that are stored as outliers.

        Args:
            channels: Channels of a head.
        """
        return max(1, round(self.outlier_ratio * channels)) if self.outlier_ratio and self.num_bits < 16 else 0

    def check(self, channels: int) -> None:
        """Check that a head can be stored in the format.

        Args:
            channels: Channels of a head.

        Raises:
            ValueError: Codes do not fill whole bytes, the group size does not divide the channels, or there are too
                many channels for outliers.
        """
        if self.num_bits == 16:
            return
        packed_size(channels, self.num_bits)
        if self.axis == "token" and self.group_size and channels % self.group_size:
            fitting = [g for g in (128, 64, 32, 16) if channels % g == 0][:2] or [channels]
            raise ValueError(
                f"group_size {self.group_size} does not divide the {channels} channels of a head; "
                f"use {' or '.join(map(str, fitting))}"
            )
        if self.outlier_ratio and channels > 256:
            raise ValueError(
                f"outliers can be stored for heads of at most 256 channels, and these have {channels}; "
                "set outlier_ratio: 0"
            )


def encode_kv(
    fmt: KvFormat, x_BHTC: Tensor, static: StaticParams | None = None, dtype: torch.dtype = torch.bfloat16
) -> Stored:
    """Store keys or values.

    Args:
        fmt: Their format.
        x_BHTC: Numbers of any float dtype; T is a multiple of `fmt.tokens_at_once`.
        static: Static parameters, where `fmt.calibrated`.
        dtype: Dtype of outliers, and of numbers of 16 bits.

    Returns:
        `codes` (B, H, T, X) uint8; `scale` and, unless symmetric, `offset`, float16, (B, H, G, C) for ranges of
        channels and (B, H, T, G) for ranges of tokens; `outlier_index` uint8 and `outlier_value` in `dtype`,
        (B, H, T, K). For 16 bits, only `plain`, in `dtype`.

    Raises:
        ValueError: Codes of a token do not fill whole bytes.
    """
    if fmt.num_bits == 16:
        return {"plain": x_BHTC.to(dtype)}
    stored: Stored = {}
    dense_BHTC = x_BHTC.float()
    if fmt.outliers(x_BHTC.shape[-1]):
        index_BHTK, dense_BHTC = _split_outliers(fmt, dense_BHTC, static)
        stored["outlier_index"] = index_BHTK.to(torch.uint8)
        stored["outlier_value"] = x_BHTC.gather(-1, index_BHTK).to(dtype)
    ranges = _static_ranges(static) if fmt.group_size is None else _group_ranges(fmt, dense_BHTC)
    if fmt.group_size is not None:
        stored |= ranges
    stored["codes"] = _to_codes(fmt, dense_BHTC, ranges, static)
    return stored


def normalize(fmt: KvFormat, x_BHTC: Tensor, static: StaticParams | None = None) -> tuple[Tensor, Tensor]:
    """Express numbers in units of their ranges, in which the levels of a table are.

    Args:
        fmt: Their format.
        x_BHTC: Numbers; outliers are replaced by the middle of their range.
        static: Static ranges, where `fmt.group_size` is None.

    Returns:
        The normalized numbers (B, H, T, C) and their units, which broadcast over them.
    """
    dense_BHTC = x_BHTC.float()
    if fmt.outliers(x_BHTC.shape[-1]):
        _, dense_BHTC = _split_outliers(fmt, dense_BHTC, static)
    ranges = _static_ranges(static) if fmt.group_size is None else _group_ranges(fmt, dense_BHTC)
    scale, offset = _expand_ranges(fmt, x_BHTC.shape, ranges)
    return (dense_BHTC - offset) / scale, scale


def decode_kv(fmt: KvFormat, stored: Stored, channels: int, static: StaticParams | None = None) -> Tensor:
    """Invert `encode_kv`.

    Args:
        fmt: Their format.
        stored: Result of `encode_kv`, or a part of it along T.
        channels: Channels of a head.
        static: Static parameters, where `fmt.calibrated`.

    Returns:
        (B, H, T, C) float32; for 16 bits, in the dtype that is stored.
    """
    if fmt.num_bits == 16:
        return stored["plain"]
    ranges = _static_ranges(static) if fmt.group_size is None else stored
    x_BHTC = _from_codes(fmt, stored["codes"], channels, ranges, static)
    if "outlier_index" in stored:
        x_BHTC = x_BHTC.scatter(-1, stored["outlier_index"].long(), stored["outlier_value"].float())
    return x_BHTC


def _group_ranges(fmt: KvFormat, x_BHTC: Tensor) -> Stored:
    """Compute the ranges of each group of numbers, as they are stored."""
    grouped = _group(fmt, x_BHTC)
    dim = 3 if fmt.axis == "channel" else -1
    lo, hi = grouped.amin(dim), grouped.amax(dim)
    if fmt.symmetric:
        return {"scale": _to_half(torch.maximum(-lo, hi) / fmt.max_code)}
    if fmt.datatype == "int":
        return {"scale": _to_half((hi - lo) / (2**fmt.num_bits - 1)), "offset": _to_half(lo, positive=False)}
    return {
        "scale": _to_half((hi - lo) / 2 / fmt.max_code),
        "offset": _to_half((hi + lo) / 2, positive=False),
    }


def _to_codes(fmt: KvFormat, x_BHTC: Tensor, ranges: Mapping[str, Tensor], static: StaticParams | None) -> Tensor:
    scale, offset = _expand_ranges(fmt, x_BHTC.shape, ranges)
    u_BHTC = (x_BHTC - offset) / scale
    if fmt.datatype == "float":
        top = fmt.max_code
        return u_BHTC.clamp_(-top, top).to(_FP8).view(torch.uint8)
    if fmt.datatype == "table":
        assert static is not None
        levels_L = static["levels"].to(x_BHTC.device)
        codes = torch.bucketize(u_BHTC, (levels_L[1:] + levels_L[:-1]) / 2)
    else:
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric else 0
        codes = u_BHTC.add_(zero).round_().clamp_(0, 2**fmt.num_bits - 1)
    return pack_planes(codes.to(torch.uint8), fmt.num_bits)


def _from_codes(
    fmt: KvFormat, codes_BHTX: Tensor, channels: int, ranges: Mapping[str, Tensor], static: StaticParams | None
) -> Tensor:
    if fmt.datatype == "float":
        u_BHTC = codes_BHTX.view(_FP8).float()
    else:
        unpacked = unpack_planes(codes_BHTX, fmt.num_bits, channels)
        if fmt.datatype == "table":
            assert static is not None
            u_BHTC = static["levels"].to(codes_BHTX.device)[unpacked.int()]
        else:
            u_BHTC = unpacked.float()
            if fmt.symmetric:
                u_BHTC -= 2 ** (fmt.num_bits - 1)
    scale, offset = _expand_ranges(fmt, u_BHTC.shape, ranges)
    return u_BHTC.mul_(scale).add_(offset)


def _expand_ranges(fmt: KvFormat, shape: torch.Size, ranges: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return scale and offset of every number of a tensor of this shape, float32, broadcasting over it."""

    def expand(param: Tensor) -> Tensor:
        param = param.float()
        if fmt.group_size is None:
            return param
        return param.repeat_interleave(shape[2] // param.shape[2], 2).repeat_interleave(shape[3] // param.shape[3], 3)

    scale = expand(ranges["scale"])
    return scale, expand(ranges["offset"]) if "offset" in ranges else torch.zeros_like(scale)


def _group(fmt: KvFormat, x_BHTC: Tensor) -> Tensor:
    """Group numbers that share a range: (B, H, G, tokens of a group, C), or (B, H, T, G, channels of a group)."""
    assert fmt.group_size is not None
    grouped: Tensor = x_BHTC.unflatten(2 if fmt.axis == "channel" else 3, (-1, fmt.group_size))
    return grouped


def _split_outliers(fmt: KvFormat, x_BHTC: Tensor, static: StaticParams | None) -> tuple[Tensor, Tensor]:
    """Return the outlier channels of each token (B, H, T, K), ascending, and x with the middle in their place."""
    middle, spread = _middle_and_spread(fmt, x_BHTC, static)
    distance = ((x_BHTC - middle) / spread).abs()
    index_BHTK = distance.topk(fmt.outliers(x_BHTC.shape[-1]), -1).indices.sort(-1).values
    return index_BHTK, x_BHTC.scatter(-1, index_BHTK, middle.expand_as(x_BHTC).gather(-1, index_BHTK))


def _middle_and_spread(fmt: KvFormat, x_BHTC: Tensor, static: StaticParams | None) -> tuple[Tensor, Tensor]:
    """Return the origin and the unit of the distances that choose outliers: those of a channel, or of a token."""
    if fmt.group_size is None:
        ranges = _static_ranges(static)
        scale, offset = _expand_ranges(fmt, x_BHTC.shape, ranges)
        if fmt.datatype == "int" and not fmt.symmetric:
            offset = offset + scale * (2**fmt.num_bits - 1) / 2
        return offset, scale
    if fmt.axis == "channel":
        grouped = _group(fmt, x_BHTC)
        # Medians, not the range: an outlier would widen the range that it is measured by.
        middle = grouped.median(3, keepdim=True).values
        spread = (grouped - middle).abs().median(3, keepdim=True).values.clamp(min=1e-12)
        return middle.expand_as(grouped).flatten(2, 3), spread.expand_as(grouped).flatten(2, 3)
    return x_BHTC.median(-1, keepdim=True).values, torch.ones_like(x_BHTC[..., :1])


def _static_ranges(static: StaticParams | None) -> dict[str, Tensor]:
    """Return static ranges as (H or 1, 1, C or 1)."""
    assert static is not None
    return {n: static[n].unsqueeze(-2) for n in ("scale", "offset") if n in static}


def _to_half(x: Tensor, *, positive: bool = True) -> Tensor:
    """Round to float16, within its range; a positive number (a scale) never to zero."""
    top = torch.finfo(torch.float16).max
    return x.clamp(2.0**-24 if positive else -top, top).half()
