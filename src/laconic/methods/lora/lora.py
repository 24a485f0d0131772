"""LoRA (Hu et al., arXiv 2106.09685): recover a pruned or quantized model by low-rank adapters, merged or separate."""

from __future__ import annotations

from typing import ClassVar, Literal

from laconic.methods.lora.adapter_stage import AdapterStage
from laconic.stages.stage import TEXT


class Lora(AdapterStage):
    """Adapters beside frozen weights in 16 bit, or beside the codes of a quantized model."""

    example: ClassVar = {
        "data": [{"dataset": TEXT}],
        "rank": 2,
        "max_steps": 2,
        "batch_size": 2,
        "max_seq_length": 32,
    }

    method: Literal["lora"] = "lora"
