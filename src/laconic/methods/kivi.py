"""KIVI (Liu et al., arXiv 2402.02750): keys per channel, values per token, recent tokens in 16 bit; no calibration.

Keys have outlier channels, large in every token, so the numbers of one channel share a range, over a group of
neighbouring tokens. Values have none, so the numbers of one token share a range, over a group of channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.stages.cache import CacheStage


class Kivi(CacheStage):
    """Options of `kivi`.

    Attributes:
        k_bits: Bits of a key's code.
        v_bits: Bits of a value's code.
        group_size: Tokens of a key's channel that share a range, and channels of a value that share one.
        key_ranges: `group`, a range for each group of tokens; `static`, one range per channel from calibration, so that
            each token is encoded at once (which vLLM serves in small pages).
        outlier_ratio: Share of a token's channels that are kept in 16 bit beside the codes.
    """

    example: ClassVar = {"k_bits": 4, "v_bits": 4, "group_size": 16}

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
