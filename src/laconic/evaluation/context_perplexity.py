"""Perplexity by position in the context, through several caches side by side, and KL to the 16-bit cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from laconic.evaluation import fidelity
from laconic.evaluation.through_cache import PLAIN, Caches, chunks, step


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, stop) of their windows.

    Attributes:
        start: First position.
        stop: Position after the last one.
        tokens: Number of tokens.
        nll: Mean negative log-likelihood in nats.
        nll_stderr: Standard error of that mean, over windows; None for one window.
        kl_mean: Mean of KL(16 bit || this cache) per token, in nats; 0 for the 16-bit cache.
        kl_p99: 99th percentile of the same.
        top1_agreement: Share of tokens where both caches rank the same token first; 1 for the 16-bit cache.
    """

    start: int
    stop: int
    tokens: int
    nll: float
    nll_stderr: float | None
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return fidelity.perplexity(self.nll)


def edges(length: int) -> list[int]:
    """Return the ends of buckets: 512 and its doublings, up to a context of `length` tokens.

    Args:
        length: Tokens of the context.
    """
    ends = []
    end = 512
    while end < length:
        ends.append(end)
        end *= 2
    return [*ends, length]


@torch.no_grad()
def perplexity_by_position(
    model: PreTrainedModel, windows: Tensor, caches: Caches, *, chunk: int = 32, ends: Sequence[int] | None = None
) -> dict[str, list[Bucket]]:
    """Measure the perplexity of windows by position, through each cache.

    Args:
        model: The model.
        windows: (n, length) token ids.
        caches: The caches, `16 bit` among them.
        chunk: Tokens per forward pass. Tokens of one chunk attend to each other in 16 bit, and to earlier tokens as the
            cache stores them.
        ends: Ends of the buckets. None: those of `edges`.

    Returns:
        By cache, the buckets; the last one is the whole window.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    # Caches run in lockstep, so that only one chunk of the 16-bit cache's logits is in memory.
    order = [PLAIN, *(name for name in caches if name != PLAIN)]
    scores: dict[str, list[Tensor]] = {name: [] for name in order}
    for ids in windows.split(1):
        running = {name: caches[name]() for name in order}
        rows: dict[str, list[Tensor]] = {name: [] for name in order}
        position = 0
        for piece in chunks(ids, chunk):
            target = ids[0, position + 1 : position + 1 + piece.shape[1]].to(model.device)
            position += piece.shape[1]
            plain = None
            for name in order:
                logp = step(model, piece, running[name])[0, : len(target)].float().log_softmax(-1)
                plain = logp if plain is None else plain
                rows[name].append(_score(logp, plain, target))
        for name in order:
            scores[name].append(torch.cat(rows[name]).cpu())
    length = windows.shape[1]
    ends = ends or edges(length)
    spans = list(dict.fromkeys([*zip([0, *ends], ends, strict=False), (0, length)]))
    return {name: [_bucket(torch.stack(scores[name]), *span) for span in spans] for name in order}


def _score(logp: Tensor, plain: Tensor, target: Tensor) -> Tensor:
    """Return for each token (tokens, 3): negative log-likelihood, KL to the 16-bit cache, equal first ranks."""
    nll = F.nll_loss(logp, target, reduction="none")
    kl = F.kl_div(logp, plain, log_target=True, reduction="none").sum(-1).clamp(min=0)
    same = logp.argmax(-1) == plain.argmax(-1)
    return torch.stack([nll, kl, same.float()], -1).double()


def _bucket(scores: Tensor, start: int, stop: int) -> Bucket:
    """Average scores (windows, length - 1, 3) over a span; the first ones belong to the token at position 1."""
    inside = scores[:, max(start, 1) - 1 : stop - 1]
    nll, kl, same = inside.unbind(-1)
    stderr = float(nll.mean(1).std() / math.sqrt(len(nll))) if len(nll) > 1 else None
    rank = max(1, math.ceil(0.99 * kl.numel()))
    return Bucket(
        start,
        stop,
        nll.numel(),
        float(nll.mean()),
        stderr,
        float(kl.mean()),
        float(kl.flatten().kthvalue(rank).values),
        float(same.mean()),
    )
