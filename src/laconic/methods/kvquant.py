"""KVQuant (Hooper et al., arXiv 2401.18079): pre-RoPE keys per channel, calibrated levels, sparse outliers.

Before the rotary embedding a key's outlier channels are the same in every token (sections 3.1, 3.2), so many tokens can
share a range: those of a group, or all, with one range from calibration as in the paper. Levels are a k-means of the
normalized numbers, weighted by the cost of an error (3.3): here the energy of the queries and the attention that a
token gets, in closed form, where the paper takes the squared gradient. The outliers of each token are stored in 16 bit
(3.4), and so are attention sinks (3.5). k-means levels, being means, have less spread than the numbers, so logits
shrink. The paper restores the standard deviation (Q-Norm, 3.6), which undoes half of that; here levels are stretched
until the least-squares line of stored on true numbers has slope 1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from laconic.kv.fit import Correction
from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.stages.cache import CacheStage


class KvQuant(CacheStage):
    """Options of `kvquant`.

    Attributes:
        k_bits: Bits of a key's code.
        v_bits: Bits of a value's code.
        key_ranges: `group`, a range for each `group_size` tokens of a channel; `static`, one range per channel from
            calibration, so that each token is encoded at once.
        group_size: Tokens of a key's channel that share a range.
        datatype: `table`, levels from calibration; `int`, evenly spaced levels.
        outlier_ratio: Share of a token's channels that are kept in 16 bit beside the codes.
        before_rope: Whether keys are stored as they were before their rotary embedding.
        correction: How levels are corrected: `slope`, as above; `q_norm`, as in the paper; `none`.
    """

    example: ClassVar = {"group_size": 16}

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
        datatype, ratio = self.datatype, self.outlier_ratio
        tokens = self.group_size if self.key_ranges == "group" else None
        return (
            KvFormat(self.k_bits, "channel", tokens, datatype, outlier_ratio=ratio),
            KvFormat(self.v_bits, "token", shape.channels, datatype, outlier_ratio=ratio),
        )
