"""Losses of training: sums over the tokens to predict, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Returns the sum over the tokens in the mask, for a model, ids (n, tokens) int64 and a loss mask (n, tokens) bool."""


def language_loss(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Compute the cross-entropy of the tokens in the loss mask.

    Args:
        model: a causal language model.
        ids: (n, tokens) int64.
        loss_mask: (n, tokens) bool.

    Returns:
        The sum, a 0-dim float32 tensor.
    """
    return F.cross_entropy(_logits(model, ids, loss_mask), ids[:, 1:][loss_mask[:, 1:]], reduction="sum")


def distillation_loss(teacher: nn.Module) -> Loss:
    """Return a loss: the sum of KL(teacher || model) over the tokens in the loss mask.

    Args:
        teacher: a causal language model with the vocabulary of the trained model, on the same device.
    """

    def loss(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_log_probs = F.log_softmax(_logits(teacher, ids, loss_mask), -1)
        log_probs = F.log_softmax(_logits(model, ids, loss_mask), -1)
        return F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")

    return loss


def _logits(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Compute the logits of the tokens in the loss mask, (tokens, vocabulary) float32."""
    # Padding comes last, where a causal model needs no attention mask.
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][loss_mask[:, 1:]].float()
