"""What is lowered in training: a sum over the tokens to be predicted, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model, ids (n, tokens) and wanted (n, tokens) bool: the sum over all wanted tokens."""


def language_loss(model: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
    """How unlikely the model finds the wanted tokens."""
    return F.cross_entropy(_logits(model, ids, wanted), ids[:, 1:][wanted[:, 1:]], reduction="sum")


def distillation_loss(teacher: nn.Module) -> Loss:
    """KL(teacher || model), where wanted tokens are predicted."""

    def loss(model: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = F.log_softmax(_logits(teacher, ids, wanted), -1)
        ours = F.log_softmax(_logits(model, ids, wanted), -1)
        return F.kl_div(ours, theirs, log_target=True, reduction="sum")

    return loss


def _logits(model: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
    """Of the wanted tokens, float32 (wanted, vocabulary). What fills rows up comes last, so no mask is needed."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][wanted[:, 1:]].float()
