"""KVQuant (Hooper et al., arXiv 2401.18079): pre-RoPE keys per channel, calibrated levels, sparse outliers.

Before the embedding turns them a key's loud channels stay where they are (sections 3.1, 3.2), so that a range may be
that of many tokens: of a group, or one from calibration for all, as the paper has it. Levels are a k-means of the
normalised numbers, weighted by what an error costs (3.3): here by the queries' energy and the attention that a token
gets, in closed form, where the paper takes the squared gradient. The farthest numbers of each token are stored in 16
bit (3.4), as are attention sinks (3.5). A level is a mean, and means lie closer together than what they stand for, so
that logits shrink; the paper gives levels the deviation of the numbers back (Q-Norm, 3.6), which undoes half of that,
and here they are stretched until what is stored rises with what it stands for one to one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from laconic.kv.fit import Correction
from laconic.kv.format import KvFormat
from laconic.kv.open import KvShape
from laconic.stages.cache import CacheStage


class KvQuant(CacheStage):
    """k_bits, v_bits: of a code. key_ranges: `group`, of so many tokens of a channel (group_size); `static`, one a
    channel from calibration, so that a token is stored as it comes. datatype: `table`, levels from calibration; `int`,
    evenly spaced. outlier_ratio: of a token's channels, kept in 16 bit beside the codes. before_rope: store keys as
    they were before their rotary embedding. correction: of levels; `slope`, as above; `q_norm`, the paper's; `none`."""

    method: Literal["kvquant"] = "kvquant"
    k_bits: int = Field(3, ge=1, le=8)
    v_bits: int = Field(3, ge=1, le=8)
    key_ranges: Literal["group", "static"] = "group"
    group_size: int = Field(64, ge=1)
    datatype: Literal["table", "int"] = "table"
    outlier_ratio: float = Field(0.01, ge=0, lt=0.5)
    sinks: int = Field(1, ge=0)
    before_rope: bool = True
    correction: Correction = "slope"

    @property
    def pre_rope(self) -> bool:
        return self.before_rope

    @property
    def level_correction(self) -> Correction:
        return self.correction

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        kind, ratio = self.datatype, self.outlier_ratio
        tokens = self.group_size if self.key_ranges == "group" else None
        return (
            KvFormat(self.k_bits, "channel", tokens, kind, outlier_ratio=ratio),
            KvFormat(self.v_bits, "token", shape.channels, kind, outlier_ratio=ratio),
        )
