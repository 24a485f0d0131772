"""What is lowered in training: a sum over the tokens to be predicted, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""loss(model, ids, loss_mask), ids and loss_mask (n, tokens): the sum over all tokens of the mask."""


def language_loss(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Compute the cross-entropy of the tokens in the loss mask."""
    return F.cross_entropy(_logits(model, ids, loss_mask), ids[:, 1:][loss_mask[:, 1:]], reduction="sum")


def distillation_loss(teacher: nn.Module) -> Loss:
    """Make a loss that is KL(teacher || model) at the tokens in the loss mask."""

    def loss(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = F.log_softmax(_logits(teacher, ids, loss_mask), -1)
        ours = F.log_softmax(_logits(model, ids, loss_mask), -1)
        return F.kl_div(ours, theirs, log_target=True, reduction="sum")

    return loss


def _logits(model: nn.Module, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Compute logits of the tokens in the loss mask: (tokens, vocabulary) float32. Padding is last: no attention mask."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1][loss_mask[:, 1:]].float()
