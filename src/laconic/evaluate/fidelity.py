"""Perplexity of a model, and how faithfully it follows its original, in one pass over the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quality:
    """nll: mean negative log-likelihood in nats over `tokens` predicted tokens; nll_stderr: of that mean, over windows,
    None for a single one.

    kl_mean, kl_p99: of KL(original || model) per token, in nats, and top1_agreement: the share of tokens where both
    rank the same token first; None without an original.
    """

    tokens: int
    nll: float
    nll_stderr: float | None
    baseline_nll: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)

    @property
    def baseline_perplexity(self) -> float | None:
        """The original's perplexity on the same windows."""
        return None if self.baseline_nll is None else _exp(self.baseline_nll)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Quality:
    """Run `model`, and `baseline` beside it, over windows (n, length) of token ids.

    Every token but a window's first is predicted from the tokens before it in its window.
    Raises: ValueError when a model puts out NaN or infinity.
    """
    nlls: list[Tensor] = []
    theirs: list[Tensor] = []
    kls: list[Tensor] = []
    agree = 0
    for ids in windows.split(1):
        logp = log_probabilities(model, ids)
        target = ids[0, 1:].to(logp.device)
        nlls.append(F.nll_loss(logp, target, reduction="none").cpu())
        if baseline is not None:
            reference = log_probabilities(baseline, ids).to(logp.device)
            theirs.append(F.nll_loss(reference, target, reduction="none").cpu())
            kls.append(F.kl_div(logp, reference, log_target=True, reduction="none").sum(-1).cpu())
            agree += int((logp.argmax(-1) == reference.argmax(-1)).sum())
    nll = torch.stack(nlls).double()
    tokens = nll.numel()
    stderr = float(nll.mean(1).std() / math.sqrt(len(nll))) if len(nll) > 1 else None
    if baseline is None:
        return Quality(tokens, float(nll.mean()), stderr)
    kl = torch.cat(kls).double().clamp(min=0)
    return Quality(
        tokens,
        float(nll.mean()),
        stderr,
        baseline_nll=float(torch.stack(theirs).double().mean()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.kthvalue(max(1, math.ceil(0.99 * tokens))).values),
        top1_agreement=agree / tokens,
    )


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token after each of ids (1, n) but the last: (n - 1, vocabulary), float32."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    logp = F.log_softmax(logits.float(), dim=-1)
    if logp.isnan().any():
        raise ValueError(f"the model puts out NaN or infinity in {model.dtype}; compute in another dtype (float32)")
    return logp
