"""How keys and values are stored in a cache: one format for keys, one for values, of each group of heads.

Numbers are (batch, heads, tokens, channels). What is stored of them is a mapping of tensors that all have the batch
first and run along time in their third dimension (in tokens, or in groups of tokens), so that a cache can join, cut,
select and count them without knowing what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.kv.planes import pack_planes, packed_size, unpack_planes

Stored = dict[str, Tensor]
Static = Mapping[str, Tensor]
"""What calibration fixed, float32: scale and offset, each broadcasting over (heads, channels); levels (2^bits,)."""

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class KvFormat:
    """num_bits: of a code; 16 stores numbers as they are. axis: which numbers share a range: `token`, neighbouring
    channels of one token; `channel`, one channel of neighbouring tokens. group_size: how many of them; None for a range
    that calibration fixed. datatype: `int`, evenly spaced codes; `table`, levels that calibration chose in [-1, 1];
    `float`, FP8 E4M3. symmetric: ranges about zero, of which one number is stored. outlier_ratio: the share of a
    token's channels, the farthest out, that are stored apart in 16 bit."""

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
        """How many tokens have to be there before they can be encoded."""
        return self.group_size if self.axis == "channel" and self.group_size and self.num_bits < 16 else 1

    @property
    def calibrated(self) -> bool:
        """Whether calibration fixed something of it."""
        return self.num_bits < 16 and (self.group_size is None or self.datatype == "table")

    @property
    def reach(self) -> float:
        """The largest code on either side of zero that a range asks for."""
        if self.datatype == "float":
            return float(torch.finfo(_FP8).max)
        return 1.0 if self.datatype == "table" else 2 ** (self.num_bits - 1) - 1

    def outliers(self, channels: int) -> int:
        """How many channels of a token are stored apart."""
        return max(1, round(self.outlier_ratio * channels)) if self.outlier_ratio and self.num_bits < 16 else 0

    def check(self, channels: int) -> None:
        """Raises: ValueError when heads of this many channels cannot be stored so."""
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
            raise ValueError(f"outliers of heads of more than 256 channels are not stored, and these have {channels}")


def encode_kv(fmt: KvFormat, x: Tensor, static: Static | None = None, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """Store x (batch, heads, tokens, channels), any float dtype; tokens a multiple of `tokens_at_once`.

    Returns: codes (batch, heads, tokens, bytes) uint8; scale and, where ranges are not symmetric, offset, float16, with
    a channel's (batch, heads, groups of tokens, channels) and a token's (batch, heads, tokens, groups of channels);
    outlier_index uint8 and outlier_value in `dtype` (batch, heads, tokens, k). For 16 bits, only `plain`, in `dtype`.
    """
    if fmt.num_bits == 16:
        return {"plain": x.to(dtype)}
    stored: Stored = {}
    dense = x.float()
    if fmt.outliers(x.shape[-1]):
        index, dense = _without_outliers(fmt, dense, static)
        stored["outlier_index"] = index.to(torch.uint8)
        stored["outlier_value"] = x.gather(-1, index).to(dtype)
    ranges = _static(static) if fmt.group_size is None else _ranges(fmt, dense)
    if fmt.group_size is not None:
        stored |= ranges
    stored["codes"] = _codes(fmt, dense, ranges, static)
    return stored


def normalised(fmt: KvFormat, x: Tensor, static: Static | None = None) -> tuple[Tensor, Tensor]:
    """x without its outliers in units of its ranges, as it meets the levels of a table; and those units, broadcasting.
    What is stored apart counts as the middle of its range."""
    dense = x.float()
    if fmt.outliers(x.shape[-1]):
        _, dense = _without_outliers(fmt, dense, static)
    ranges = _static(static) if fmt.group_size is None else _ranges(fmt, dense)
    scale, offset = _over(fmt, x.shape, ranges)
    return (dense - offset) / scale, scale


def decode_kv(fmt: KvFormat, stored: Stored, channels: int, static: Static | None = None) -> Tensor:
    """What was stored, (batch, heads, tokens, channels), float32 (16 bits: in its own dtype)."""
    if fmt.num_bits == 16:
        return stored["plain"]
    ranges = _static(static) if fmt.group_size is None else stored
    x = _values(fmt, stored["codes"], channels, ranges, static)
    if "outlier_index" in stored:
        x = x.scatter(-1, stored["outlier_index"].long(), stored["outlier_value"].float())
    return x


def _ranges(fmt: KvFormat, x: Tensor) -> Stored:
    """Ranges of x's own groups, as they are stored."""
    tiles = _tiles(fmt, x)
    dim = 3 if fmt.axis == "channel" else -1
    lo, hi = tiles.amin(dim), tiles.amax(dim)
    if fmt.symmetric:
        return {"scale": _half(torch.maximum(-lo, hi) / fmt.reach)}
    if fmt.datatype == "int":
        return {"scale": _half((hi - lo) / (2**fmt.num_bits - 1)), "offset": _half(lo, positive=False)}
    return {"scale": _half((hi - lo) / 2 / fmt.reach), "offset": _half((hi + lo) / 2, positive=False)}


def _codes(fmt: KvFormat, x: Tensor, ranges: Mapping[str, Tensor], static: Static | None) -> Tensor:
    scale, offset = _over(fmt, x.shape, ranges)
    u = (x - offset) / scale
    if fmt.datatype == "float":
        top = fmt.reach
        return u.clamp_(-top, top).to(_FP8).view(torch.uint8)
    if fmt.datatype == "table":
        assert static is not None
        levels = static["levels"].to(x.device)
        codes = torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)
    else:
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric else 0
        codes = u.add_(zero).round_().clamp_(0, 2**fmt.num_bits - 1)
    return pack_planes(codes.to(torch.uint8), fmt.num_bits)


def _values(fmt: KvFormat, codes: Tensor, channels: int, ranges: Mapping[str, Tensor], static: Static | None) -> Tensor:
    if fmt.datatype == "float":
        u = codes.view(_FP8).float()
    else:
        unpacked = unpack_planes(codes, fmt.num_bits, channels)
        if fmt.datatype == "table":
            assert static is not None
            u = static["levels"].to(codes.device)[unpacked.int()]
        else:
            u = unpacked.float()
            if fmt.symmetric:
                u -= 2 ** (fmt.num_bits - 1)
    scale, offset = _over(fmt, u.shape, ranges)
    return u.mul_(scale).add_(offset)


def _over(fmt: KvFormat, shape: torch.Size, ranges: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and offset of every number of x of this shape, float32, broadcasting."""

    def spread(p: Tensor) -> Tensor:
        p = p.float()
        if fmt.group_size is None:
            return p
        return p.repeat_interleave(shape[2] // p.shape[2], 2).repeat_interleave(shape[3] // p.shape[3], 3)

    scale = spread(ranges["scale"])
    return scale, spread(ranges["offset"]) if "offset" in ranges else torch.zeros_like(scale)


def _tiles(fmt: KvFormat, x: Tensor) -> Tensor:
    """(batch, heads, groups, tokens, channels), or (batch, heads, tokens, groups, channels)."""
    assert fmt.group_size is not None
    tiles: Tensor = x.unflatten(2 if fmt.axis == "channel" else 3, (-1, fmt.group_size))
    return tiles


def _without_outliers(fmt: KvFormat, x: Tensor, static: Static | None) -> tuple[Tensor, Tensor]:
    """Which channels of each token are stored apart (..., k), rising, and x with the middle in their place."""
    middle, spread = _middle_and_spread(fmt, x, static)
    far = ((x - middle) / spread).abs()
    index = far.topk(fmt.outliers(x.shape[-1]), -1).indices.sort(-1).values
    return index, x.scatter(-1, index, middle.expand_as(x).gather(-1, index))


def _middle_and_spread(fmt: KvFormat, x: Tensor, static: Static | None) -> tuple[Tensor, Tensor]:
    """From where, and in what unit, it is measured how far out a number is: that of its channel, or of its token."""
    if fmt.group_size is None:
        ranges = _static(static)
        scale, offset = _over(fmt, x.shape, ranges)
        if fmt.datatype == "int" and not fmt.symmetric:
            offset = offset + scale * (2**fmt.num_bits - 1) / 2
        return offset, scale
    if fmt.axis == "channel":
        tiles = _tiles(fmt, x)
        # Not the range: what is far out would be its own measure.
        middle = tiles.median(3, keepdim=True).values
        spread = (tiles - middle).abs().median(3, keepdim=True).values.clamp(min=1e-12)
        return middle.expand_as(tiles).flatten(2, 3), spread.expand_as(tiles).flatten(2, 3)
    return x.median(-1, keepdim=True).values, torch.ones_like(x[..., :1])


def _static(static: Static | None) -> dict[str, Tensor]:
    """Fixed ranges, (heads or 1, 1, channels or 1)."""
    assert static is not None
    return {n: static[n].unsqueeze(-2) for n in ("scale", "offset") if n in static}


def _half(x: Tensor, *, positive: bool = True) -> Tensor:
    """As it is stored: float16, within its range; a scale never zero."""
    top = torch.finfo(torch.float16).max
    return x.clamp(2.0**-24 if positive else -top, top).half()
