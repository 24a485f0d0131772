"""QLoRA (Dettmers et al., arXiv 2305.14314): train LoRA adapters while the frozen weights are in 4 bits (NF4).

It saves memory only: weights are rounded for training alone, and adapters are merged into the 16-bit weights of the
file. Paged optimizers (section 3) are left out: they move memory and change no number.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from laconic.methods.lora.adapter_stage import AdapterStage
from laconic.methods.lora.adapters import Nf4Linear


class QLora(AdapterStage):
    """Adapters beside frozen weights in NF4."""

    method: Literal["qlora"] = "qlora"
    gradient_checkpointing: bool = True

    @property
    def packed(self) -> bool:
        return True

    def frozen(self, linear: nn.Linear) -> nn.Module:
        return Nf4Linear(linear)
