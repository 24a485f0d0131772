"""LoRA (Hu et al., arXiv 2106.09685): recover a pruned or quantized model by low-rank adapters, merged or separate."""

from __future__ import annotations

from typing import Literal

from laconic.methods.lora.adapter_stage import AdapterStage


class Lora(AdapterStage):
    """Adapters beside frozen weights in 16 bit, or beside the codes of a quantized model."""

    method: Literal["lora"] = "lora"
