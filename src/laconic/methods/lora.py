"""LoRA (Hu et al., arXiv 2106.09685): recover a pruned or quantized model by low-rank adapters, merged or separate."""

from __future__ import annotations

from typing import Literal

from laconic.train.recovery import Recovery


class Lora(Recovery):
    """Options are those of every recovery."""

    method: Literal["lora"] = "lora"
