"""FP8 E4M3 cache: one calibrated scale per layer for keys and one for values; engines have kernels for it.

Written as compressed-tensors' `kv_cache_scheme` too, which vLLM reads by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.open import KvShape
from laconic.stages.cache import CacheStage


class KvFp8(CacheStage):
    """It has no options of its own."""

    method: Literal["kv_fp8"] = "kv_fp8"

    @property
    def engine_scheme(self) -> dict[str, Any] | None:
        return {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def engine_scales(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"k_scale": told["keys.8.scale"].view(1), "v_scale": told["values.8.scale"].view(1)}

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        fmt = KvFormat(8, "token", None, "float", symmetric=True)
        return fmt, fmt
