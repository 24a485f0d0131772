"""How a walk goes about it: where, how much at once, in how much memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from laconic.structure.experts import calibrate_all_experts


@dataclass(frozen=True)
class Settings:
    """device: where blocks are compressed. batch: samples run at once. budget: bytes of calibration activations kept
    in memory before they spill to a file. all_experts: show experts every token while they are observed."""

    device: torch.device
    batch: int
    budget: float
    all_experts: bool = False

    def showing(self, *modules: nn.Module | None) -> AbstractContextManager[None]:
        """While this lasts every token is shown to every expert, if that was asked for."""
        return calibrate_all_experts(*(m for m in modules if m is not None and self.all_experts))
