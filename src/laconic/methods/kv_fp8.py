"""FP8 E4M3 cache: one calibrated scale per layer for keys and one for values; engines have kernels for it.

It is also written as compressed-tensors' `kv_cache_scheme`, which vLLM reads without our plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.stages.cache import CacheStage


class KvFp8(CacheStage):
    """Options of `kv_fp8`: those of every cache method."""

    method: Literal["kv_fp8"] = "kv_fp8"

    @property
    def engine_scheme(self) -> dict[str, Any] | None:
        return {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

    def engine_scales(self, calibration: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"k_scale": calibration["keys.8.scale"].view(1), "v_scale": calibration["values.8.scale"].view(1)}

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        fmt = KvFormat(8, "token", None, "float", symmetric=True)
        return fmt, fmt
