"""Per-token cache: 8- or 4-bit keys and values, one dynamic range per token and head; the baseline of cache methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.stages.cache import CacheStage


class KvPerToken(CacheStage):
    """Options of `kv_per_token`.

    Attributes:
        k_bits: Bits of a key's code.
        v_bits: Bits of a value's code.
        symmetric: Whether ranges are symmetric about zero.
    """

    method: Literal["kv_per_token"] = "kv_per_token"
    k_bits: int = Field(8, ge=1, le=8)
    v_bits: int = Field(8, ge=1, le=8)
    symmetric: bool = False

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        return (
            KvFormat(self.k_bits, "token", shape.channels, symmetric=self.symmetric),
            KvFormat(self.v_bits, "token", shape.channels, symmetric=self.symmetric),
        )
