"""Settings of a walk: device, batch, memory, and the routing of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from laconic.structure.experts import calibrate_all_experts


@dataclass(frozen=True)
class Settings:
    """Settings of a walk.

    Attributes:
        device: where blocks are compressed.
        batch: samples run at once.
        budget: bytes of calibration activations in memory; beyond these they are stored in a file.
        all_experts: whether experts are observed on every token, not only on those that are routed to them.
    """

    device: torch.device
    batch: int
    budget: float
    all_experts: bool = False

    def expert_routing(self, *modules: nn.Module | None) -> AbstractContextManager[None]:
        """Give every token to every expert of these modules within the context, if `all_experts` is set.

        Args:
            *modules: that contain experts, at any depth; None is skipped.

        Returns:
            The context, to be used once.
        """
        return calibrate_all_experts(*(m for m in modules if m is not None and self.all_experts))
