"""Perplexity of a model, and how faithfully it follows its original, in one pass over the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from laconic.evaluate.bootstrap import interval, mean_of, paired, perplexity_of
from laconic.evaluate.calibration import Predictions


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


@dataclass(frozen=True)
class Tokens:
    """What a model says of the next tokens of windows; all (windows, tokens) float32, on the CPU.

    nll: negative log-likelihood in nats. confidence: probability of the token that it ranks first; right: 1 where that
    is the one, else 0. brier: sum over the vocabulary of (probability - truth)^2, in [0, 2].
    """

    nll: Tensor
    confidence: Tensor
    right: Tensor
    brier: Tensor

    def predictions(self) -> Predictions:
        """As calibration reads them; windows are what is drawn again."""
        n, tokens = self.nll.shape
        confidence, right, brier = (t.double().flatten().numpy() for t in (self.confidence, self.right, self.brier))
        return Predictions(confidence, right, brier, np.repeat(np.arange(n), tokens), (n,))


@dataclass(frozen=True)
class Observed:
    """Two models on the same windows: ours, and the original, with KL(original || model) in nats and whether both rank
    the same token first, (windows, tokens)."""

    ours: Tokens
    theirs: Tokens | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None

    def quality(self) -> Quality:
        """The figures over all tokens."""
        nll = self.ours.nll.double()
        tokens = nll.numel()
        stderr = float(nll.mean(1).std() / math.sqrt(len(nll))) if len(nll) > 1 else None
        if self.theirs is None or self.kl is None or self.agree is None:
            return Quality(tokens, float(nll.mean()), stderr)
        kl = self.kl.double().flatten()
        return Quality(
            tokens,
            float(nll.mean()),
            stderr,
            baseline_nll=float(self.theirs.nll.double().mean()),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.kthvalue(max(1, math.ceil(0.99 * tokens))).values),
            top1_agreement=int(self.agree.sum()) / tokens,
        )

    def intervals(self) -> dict[str, Any]:
        """95 % intervals over resampled windows, None for a single window: [low, high] of the figures, and of their
        paired differences to the original."""
        n = [len(self.ours.nll)]
        nll = _by_window(self.ours.nll)
        found: dict[str, Any] = {"perplexity_interval": interval(perplexity_of(nll), n)}
        if self.theirs is None or self.kl is None or self.agree is None:
            return found
        base = _by_window(self.theirs.nll)
        return found | {
            "baseline_perplexity_interval": interval(perplexity_of(base), n),
            "perplexity_difference_interval": paired(perplexity_of(nll), perplexity_of(base), n),
            # Perplexities of different texts are no more apart than their ratios to the original's.
            "perplexity_ratio_interval": interval(perplexity_of(nll - base), n),
            "kl_mean_interval": interval(mean_of(_by_window(self.kl)), n),
            "top1_agreement_interval": interval(mean_of(_by_window(self.agree)), n),
        }


def _by_window(values: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    found: np.ndarray[Any, np.dtype[np.float64]] = values.double().mean(1).numpy()
    return found


def measure(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Quality:
    """The figures of `observe`. Raises: ValueError when a model puts out NaN or infinity."""
    return observe(model, windows, baseline).quality()


@torch.no_grad()
def observe(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Observed:
    """Run `model`, and `baseline` beside it, over windows (n, length) of token ids.

    Every token but a window's first is predicted from the tokens before it in its window.
    Raises: ValueError when a model puts out NaN or infinity.
    """
    ours: list[Tokens] = []
    theirs: list[Tokens] = []
    kls: list[Tensor] = []
    agree: list[Tensor] = []
    for ids in windows.split(1):
        logp = log_probabilities(model, ids)
        target = ids[0, 1:].to(logp.device)
        ours.append(_tokens(logp, target))
        if baseline is not None:
            reference = log_probabilities(baseline, ids).to(logp.device)
            theirs.append(_tokens(reference, target))
            kls.append(F.kl_div(logp, reference, log_target=True, reduction="none").sum(-1).clamp(min=0).cpu())
            agree.append((logp.argmax(-1) == reference.argmax(-1)).float().cpu())
    if baseline is None:
        return Observed(_stacked(ours))
    return Observed(_stacked(ours), _stacked(theirs), torch.stack(kls), torch.stack(agree))


def _tokens(logp: Tensor, target: Tensor) -> Tokens:
    """Of log-probabilities (tokens, vocabulary) and the tokens that came, in one row."""
    nll = F.nll_loss(logp, target, reduction="none")
    best = logp.argmax(-1)
    # The whole vocabulary's probabilities are held for a few tokens at a time.
    squares = torch.cat([rows.exp().square_().sum(-1) for rows in logp.split(128)])
    brier = (squares - 2 * nll.neg().exp() + 1).clamp(min=0)
    confidence = logp.gather(1, best[:, None])[:, 0].exp()
    return Tokens(*(t.cpu() for t in (nll, confidence, (best == target).float(), brier)))


def _stacked(rows: list[Tokens]) -> Tokens:
    return Tokens(*(torch.stack(column) for column in zip(*(vars(r).values() for r in rows), strict=True)))


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token after each of ids (1, n) but the last: (n - 1, vocabulary), float32."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    logp = F.log_softmax(logits.float(), dim=-1)
    if logp.isnan().any():
        raise ValueError(f"the model puts out NaN or infinity in {model.dtype}; compute in another dtype (float32)")
    return logp
