"""Int8 cache: one calibrated scale per layer for keys and one for values; engines read it."""

from __future__ import annotations

from typing import Literal

from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.stages.cache import CacheStage


class KvInt8(CacheStage):
    """Options of `kv_int8`: those of every cache method."""

    method: Literal["kv_int8"] = "kv_int8"

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        fmt = KvFormat(8, "token", None, symmetric=True)
        return fmt, fmt
