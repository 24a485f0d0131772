"""Forward passes through a cache: a text is read in chunks, so that later tokens attend to what the cache stores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from laconic.evaluation.fidelity import not_finite

Caches = Mapping[str, Callable[[], Cache]]
"""By name, a function that makes a new, empty cache. `16 bit` is the one that the others are compared with."""

PLAIN = "16 bit"


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    """Return transformers' own cache, which stores keys and values unchanged.

    Args:
        model: The model.
    """
    return DynamicCache(config=model.config)


def step(model: PreTrainedModel, ids: Tensor, cache: Cache, *, last: bool = False) -> Tensor:
    """Run one forward pass, and append its keys and values to the cache.

    Args:
        model: The model.
        ids: (rows, tokens) token ids.
        cache: The cache.
        last: Whether to compute the logits of the last token only.

    Returns:
        Logits (rows, tokens, vocabulary) in the model's dtype.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    parameters = inspect.signature(type(model).forward).parameters
    # The argument has different names in different versions of transformers.
    arguments: dict[str, Any] = {"cache" if "cache" in parameters else "past_key_values": cache}
    if last and "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=True, **arguments).logits
    if not logits.amax().isfinite():
        raise ValueError(not_finite(model))
    return logits[:, -1:] if last else logits


def chunks(ids: Tensor, size: int) -> Iterator[Tensor]:
    """Split token ids into pieces along the tokens.

    Args:
        ids: (rows, tokens) token ids.
        size: Tokens per piece.

    Yields:
        (rows, at most `size`) token ids.
    """
    return iter(ids.split(size, dim=1))


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, ids: Tensor, cache: Cache, *, chunk: int, tokens: int) -> Tensor:
    """Read prompts of one length in chunks, then generate the likeliest tokens.

    Args:
        model: The model.
        ids: (rows, tokens) token ids of the prompts.
        cache: An empty cache.
        chunk: Tokens per forward pass of the prompts.
        tokens: Number of new tokens.

    Returns:
        (rows, new tokens) int64, on the CPU.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    logits = None
    for piece in chunks(ids, chunk):
        logits = step(model, piece, cache, last=True)
    assert logits is not None
    generated = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(tokens - 1):
        generated.append(step(model, generated[-1], cache, last=True)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(generated, 1).cpu()
