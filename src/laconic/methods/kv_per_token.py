"""Per-token cache: 8- or 4-bit keys and values, one dynamic range per token and head; the baseline of cache methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from laconic.kv.format import KvFormat
from laconic.kv.open import KvShape
from laconic.stages.cache import CacheStage


class KvPerToken(CacheStage):
    """k_bits, v_bits: of a code. symmetric: ranges about zero."""

    method: Literal["kv_per_token"] = "kv_per_token"
    k_bits: int = Field(8, ge=1, le=8)
    v_bits: int = Field(8, ge=1, le=8)
    symmetric: bool = False

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        return (
            KvFormat(self.k_bits, "token", shape.channels, symmetric=self.symmetric),
            KvFormat(self.v_bits, "token", shape.channels, symmetric=self.symmetric),
        )
