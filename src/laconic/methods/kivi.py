"""KIVI (Liu et al., arXiv 2402.02750): keys per channel, values per token, recent tokens in 16 bit; no calibration.

Keys have channels that are loud in every token, so a channel's range is that of a group of neighbouring tokens; values
have none, so a token's range is that of a group of its channels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from laconic.kv.format import KvFormat
from laconic.kv.open import KvShape
from laconic.stages.cache import CacheStage


class Kivi(CacheStage):
    """k_bits, v_bits: of a code. group_size: tokens of a channel that share a range, and channels of a token.
    key_ranges: `group`, from each group of tokens; `static`, one a channel from calibration, so that a token is stored
    as it comes (what vLLM serves). outlier_ratio: of a token's channels, kept in 16 bit beside the codes."""

    method: Literal["kivi"] = "kivi"
    k_bits: int = Field(2, ge=1, le=8)
    v_bits: int = Field(2, ge=1, le=8)
    group_size: int = Field(32, ge=1)
    residual_length: int = Field(128, ge=0)
    key_ranges: Literal["group", "static"] = "group"
    outlier_ratio: float = Field(0.0, ge=0, lt=0.5)

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        tokens = self.group_size if self.key_ranges == "group" else None
        return (
            KvFormat(self.k_bits, "channel", tokens, outlier_ratio=self.outlier_ratio),
            KvFormat(self.v_bits, "token", min(self.group_size, shape.channels), outlier_ratio=self.outlier_ratio),
        )
