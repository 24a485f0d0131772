"""QLoRA (Dettmers et al., arXiv 2305.14314): train LoRA adapters while the frozen weights are in 4 bits (NF4).

Only memory is saved: adapters are merged into the 16-bit weights of the file, which were rounded for training alone.
Paged optimizers (section 3) move memory and change no number; they belong to bitsandbytes, and are left to it.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from laconic.runtime.adapters import Nf4Linear
from laconic.train.recovery import Recovery


class QLora(Recovery):
    """Options are those of every recovery."""

    method: Literal["qlora"] = "qlora"
    gradient_checkpointing: bool = True

    @property
    def packed(self) -> bool:
        return True

    def hold(self, linear: nn.Linear) -> nn.Module:
        return Nf4Linear(linear)
