"""Perplexity by position in the context, read through caches side by side, and KL to the 16-bit cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from laconic.evaluate.through_cache import PLAIN, Caches, chunks, step


@dataclass(frozen=True)
class Bucket:
    """Tokens that stand at positions [start, stop) of their windows: nll, their mean negative log-likelihood in nats;
    nll_stderr, of that mean over windows, None for one window.

    kl_mean, kl_p99: of KL(16 bit || this cache) per token, in nats; top1_agreement: where both rank the same token
    first. Exactly 0, 0 and 1 for the 16-bit cache itself.
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
        return math.exp(self.nll) if self.nll < 700 else math.inf


def edges(length: int) -> list[int]:
    """Where buckets end: 512, and its doublings, up to a context of so many tokens."""
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
    """Of every cache, the last bucket being the whole window, the buckets of windows (n, length) of token ids.

    chunk: tokens of one forward pass. They see each other in 16 bit, whatever the cache; those before them, as the
    cache gives them back. ends: of the buckets. caches: `16 bit` among them.
    Raises: ValueError when the model puts out NaN or infinity.
    """
    # Caches run in step, so that no more than one chunk's logits of the 16-bit cache are kept.
    order = [PLAIN, *(name for name in caches if name != PLAIN)]
    found: dict[str, list[Tensor]] = {name: [] for name in order}
    for ids in windows.split(1):
        running = {name: caches[name]() for name in order}
        rows: dict[str, list[Tensor]] = {name: [] for name in order}
        at = 0
        for piece in chunks(ids, chunk):
            target = ids[0, at + 1 : at + 1 + piece.shape[1]].to(model.device)
            at += piece.shape[1]
            plain = None
            for name in order:
                logp = step(model, piece, running[name])[0, : len(target)].float().log_softmax(-1)
                plain = logp if plain is None else plain
                rows[name].append(_compared(logp, plain, target))
        for name in order:
            found[name].append(torch.cat(rows[name]).cpu())
    length = windows.shape[1]
    spans = [*zip([0, *(ends or edges(length))], ends or edges(length), strict=False), (0, length)]
    spans = list(dict.fromkeys(spans))
    return {name: [_bucket(torch.stack(found[name]), *span) for span in spans] for name in order}


def _compared(logp: Tensor, plain: Tensor, target: Tensor) -> Tensor:
    """Of each token (tokens, 3): its negative log-likelihood, the KL to the 16-bit cache, whether both would say it."""
    nll = F.nll_loss(logp, target, reduction="none")
    kl = F.kl_div(logp, plain, log_target=True, reduction="none").sum(-1).clamp(min=0)
    same = logp.argmax(-1) == plain.argmax(-1)
    return torch.stack([nll, kl, same.float()], -1).double()


def _bucket(values: Tensor, start: int, stop: int) -> Bucket:
    """values: (windows, length - 1, 3), of which the first tells of the token at position 1."""
    inside = values[:, max(start, 1) - 1 : stop - 1]
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
