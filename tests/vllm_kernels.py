"""What vLLM's CPU build 0.32 can compute depends on the processor: marks for tests that need a kernel of its own."""

from __future__ import annotations

import pytest
import torch

_HAS_TILES = torch.cpu._is_amx_tile_supported()
BLOCKS_OF_FP8 = pytest.mark.skipif(not _HAS_TILES, reason="vLLM's CPU kernel for FP8 blocks needs AMX tiles")
EXPERTS = pytest.mark.skipif(not _HAS_TILES, reason="vLLM's CPU kernels for experts need AMX tiles")
FP8_CACHE = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache on a CPU needs AVX-512")
FOUR_BITS = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU kernel for 4-bit weights needs AVX-512"
)
EIGHT_BITS = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="without VNNI vLLM's products of 8-bit integers are not exact on a CPU"
)
