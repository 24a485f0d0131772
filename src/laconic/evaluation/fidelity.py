"""Perplexity of a model, and its fidelity to the original, in one pass over the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from laconic.checkpoint.files import first_line
from laconic.evaluation.bootstrap import Values, interval, mean_of, paired_interval, perplexity_of
from laconic.evaluation.calibration import Predictions
from laconic.structure.calls import is_of_transformers


@dataclass(frozen=True)
class Quality:
    """Mean figures of a model over all predicted tokens.

    Attributes:
        tokens: Number of predicted tokens.
        nll: Mean negative log-likelihood in nats.
        nll_stderr: Standard error of that mean, over windows; None for one window.
        baseline_nll: The original's mean negative log-likelihood; None without an original.
        kl_mean: Mean of KL(original || model) per token, in nats; None without an original.
        kl_p99: 99th percentile of the same; None without an original.
        top1_agreement: Share of tokens where both models rank the same token first; None without an original.
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
        return perplexity(self.nll)

    @property
    def baseline_perplexity(self) -> float | None:
        """The original's perplexity on the same windows."""
        return None if self.baseline_nll is None else perplexity(self.baseline_nll)


def perplexity(nll: float) -> float:
    """Compute the perplexity exp(nll).

    Args:
        nll: Mean negative log-likelihood per token, in nats.

    Returns:
        The perplexity; inf where it overflows.
    """
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class TokenScores:
    """A model's predictions of the next tokens of windows; all (windows, tokens) float32, on the CPU.

    Attributes:
        nll: Negative log-likelihood in nats.
        confidence: Probability of the token that the model ranks first.
        correct: 1 where that is the next token, else 0.
        brier: Sum over the vocabulary of (probability - truth)^2, in [0, 2].
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor
    brier: Tensor

    def predictions(self) -> Predictions:
        """Return the same as predictions for `calibration`, with windows as the units that are resampled."""
        n, tokens = self.nll.shape
        confidence, correct, brier = (t.double().flatten().numpy() for t in (self.confidence, self.correct, self.brier))
        return Predictions(confidence, correct, brier, np.repeat(np.arange(n), tokens), (n,))


@dataclass(frozen=True)
class Observation:
    """A model and its original on the same windows.

    Attributes:
        model: Predictions of the model.
        baseline: Predictions of the original, if there is one.
        kl: (windows, tokens) KL(original || model) in nats, if there is an original.
        agree: (windows, tokens) 1 where both rank the same token first, else 0, if there is an original.
    """

    model: TokenScores
    baseline: TokenScores | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None

    def quality(self) -> Quality:
        """Compute the means over all tokens."""
        nll = self.model.nll.double()
        tokens = nll.numel()
        stderr = float(nll.mean(1).std() / math.sqrt(len(nll))) if len(nll) > 1 else None
        if self.baseline is None or self.kl is None or self.agree is None:
            return Quality(tokens, float(nll.mean()), stderr)
        kl = self.kl.double().flatten()
        return Quality(
            tokens,
            float(nll.mean()),
            stderr,
            baseline_nll=float(self.baseline.nll.double().mean()),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.kthvalue(max(1, math.ceil(0.99 * tokens))).values),
            top1_agreement=int(self.agree.sum()) / tokens,
        )

    def intervals(self) -> dict[str, Any]:
        """Compute 95 % intervals [low, high] over windows, None for one window.

        Returns:
            Intervals of perplexity, and with an original of its perplexity, the paired difference and ratio, KL and
            top-1 agreement.
        """
        n = [len(self.model.nll)]
        nll = _window_means(self.model.nll)
        intervals: dict[str, Any] = {"perplexity_interval": interval(perplexity_of(nll), n)}
        if self.baseline is None or self.kl is None or self.agree is None:
            return intervals
        base = _window_means(self.baseline.nll)
        return intervals | {
            "baseline_perplexity_interval": interval(perplexity_of(base), n),
            "perplexity_difference_interval": paired_interval(perplexity_of(nll), perplexity_of(base), n),
            # The ratio can be compared between texts, which the difference cannot.
            "perplexity_ratio_interval": interval(perplexity_of(nll - base), n),
            "kl_mean_interval": interval(mean_of(_window_means(self.kl)), n),
            "top1_agreement_interval": interval(mean_of(_window_means(self.agree)), n),
        }


def _window_means(values: Tensor) -> Values:
    means: Values = values.double().mean(1).numpy()
    return means


def measure(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Quality:
    """Compute the means over all predicted tokens of windows.

    Args:
        model: The model.
        windows: (n, length) token ids.
        baseline: The original, if the fidelity to it is asked for.

    Returns:
        The means.

    Raises:
        ValueError: A model returns NaN or infinity.
    """
    return observe(model, windows, baseline).quality()


@torch.no_grad()
def observe(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Observation:
    """Run a model, and its original, over windows.

    Every token of a window but its first is predicted from the tokens before it in the window.

    Args:
        model: The model.
        windows: (n, length) token ids.
        baseline: The original.

    Returns:
        The predictions of both.

    Raises:
        ValueError: A model returns NaN or infinity.
    """
    model_rows: list[TokenScores] = []
    baseline_rows: list[TokenScores] = []
    kls: list[Tensor] = []
    agree: list[Tensor] = []
    for ids in windows.split(1):
        logp = log_probabilities(model, ids)
        target = ids[0, 1:].to(logp.device)
        model_rows.append(_score(logp, target))
        if baseline is not None:
            reference = log_probabilities(baseline, ids).to(logp.device)
            baseline_rows.append(_score(reference, target))
            kls.append(F.kl_div(logp, reference, log_target=True, reduction="none").sum(-1).clamp(min=0).cpu())
            agree.append((logp.argmax(-1) == reference.argmax(-1)).float().cpu())
    if baseline is None:
        return Observation(_stack(model_rows))
    return Observation(_stack(model_rows), _stack(baseline_rows), torch.stack(kls), torch.stack(agree))


def _score(logp: Tensor, target: Tensor) -> TokenScores:
    """Score log-probabilities (tokens, vocabulary) against the next tokens (tokens,) of one window."""
    nll = F.nll_loss(logp, target, reduction="none")
    best = logp.argmax(-1)
    # In chunks: exp() of all tokens at once would double the memory of the logits.
    squares = torch.cat([rows.exp().square_().sum(-1) for rows in logp.split(128)])
    brier = (squares - 2 * nll.neg().exp() + 1).clamp(min=0)
    confidence = logp.gather(1, best[:, None])[:, 0].exp()
    return TokenScores(*(t.cpu() for t in (nll, confidence, (best == target).float(), brier)))


def _stack(rows: list[TokenScores]) -> TokenScores:
    return TokenScores(*(torch.stack(column) for column in zip(*(vars(r).values() for r in rows), strict=True)))


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute log-probabilities of the next token after each token of a window but the last.

    Args:
        model: The model.
        ids: (1, n) token ids.

    Returns:
        (n - 1, vocabulary) float32, on the device of the model's logits.

    Raises:
        ValueError: The model returns NaN or infinity, or transformers cannot run it on text alone.
    """
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    except Exception as e:
        if not is_of_transformers(e):
            raise
        name = model.config.model_type
        raise ValueError(f"transformers {transformers.__version__} cannot run '{name}' on text: {first_line(e)}") from e
    logp = F.log_softmax(logits.float(), dim=-1)
    if logp.isnan().any():
        raise ValueError(not_finite(model))
    return logp


def not_finite(model: PreTrainedModel) -> str:
    """Return the message for a model that returns NaN or infinity.

    Args:
        model: The model; the message has its dtype.
    """
    return f"the model returns NaN or infinity in {model.dtype}; compute in another dtype (--dtype float32)"
