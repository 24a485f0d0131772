"""The vLLM plugin: native artifacts, packed key-value caches, and models whose blocks differ in width.

vLLM finds `register` through the entry point `vllm.general_plugins`, wherever laconic is installed beside it. Native
artifacts are those of `quant_method: laconic`. Their linears are in `serving.vllm_linear`, caches in `serving.vllm_kv`
and `serving.vllm_choice`, widths in `serving.vllm_widths`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from laconic.formats.schemes import Scheme
from laconic.runtime.quant_config import NATIVE, schemes_from_config
from laconic.serving.vllm_choice import register_kv
from laconic.serving.vllm_linear import LaconicLinearMethod, engine_method
from laconic.serving.vllm_widths import register_widths

# vLLM prints what loggers below its own name say.
log = init_logger(f"vllm.{__name__}")


def register() -> None:
    """Register `quant_method: laconic`, packed caches and widths by block with vLLM; may be called again."""
    register_quantization_config(NATIVE)(VllmLaconicConfig)
    register_kv()
    register_widths()


class VllmLaconicConfig(QuantizationConfig):
    """The quantization_config of a native artifact, as vLLM reads it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self._warned = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmLaconicConfig:
        return cls(config)

    def get_name(self) -> str:
        return NATIVE

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a linear, fused or not, or of the head; None for other layers.

        Args:
            layer: Layer that vLLM builds.
            prefix: Its name in the model.

        Raises:
            ValueError: vLLM fuses linears that have different schemes.
        """
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            # Many of vLLM's models give their embeddings no name; the class of modules stands for them.
            table = schemes_from_config(self.config, [prefix], [prefix]).get(prefix)
            return _table_method(table) if table else None
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{n}" if parent else n for n in leaves]
        schemes = schemes_from_config(self.config, names)
        if not schemes:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if len(schemes) < len(names) or len(set(schemes.values())) > 1:
            raise ValueError(
                f"vLLM fuses {', '.join(names)}, which have different schemes in this artifact; give them one scheme "
                "in the recipe"
            )
        scheme = schemes[names[0]]
        engine = engine_method(scheme, layer, prefix)
        if engine is None and not scheme.integer and not self._warned:
            log.warning("laconic: %s is decoded and its arithmetic simulated; do not measure its speed", scheme.title)
            self._warned = True
        return LaconicLinearMethod(scheme, engine)


def _table_method(scheme: Scheme) -> QuantizeMethodBase:
    """Return vLLM's own method for quantized embeddings."""
    return CompressedTensorsEmbeddingWNA16Int(QuantizationArgs.model_validate(scheme.weights.to_config()))
