"""Forward passes through a cache: a text in chunks, so that later tokens see what the cache made of earlier ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

Caches = Mapping[str, Callable[[], Cache]]
"""By name, what makes a new, empty cache. The one named `16 bit` is what the others are compared with."""

PLAIN = "16 bit"


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache, which keeps keys and values as the model makes them."""
    return DynamicCache(config=model.config)


def step(model: PreTrainedModel, ids: Tensor, cache: Cache, *, last: bool = False) -> Tensor:
    """One forward pass over ids (rows, tokens), which the cache takes in.

    Returns: logits (rows, tokens, vocabulary), of the last token alone where asked, in the model's dtype.
    Raises: ValueError when the model puts out NaN or infinity.
    """
    known = inspect.signature(type(model).forward).parameters
    # transformers renamed it.
    given: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": cache}
    if last and "logits_to_keep" in known:
        given["logits_to_keep"] = 1
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=True, **given).logits
    if not logits.amax().isfinite():
        raise ValueError(f"the model puts out NaN or infinity in {model.dtype}; compute in another dtype (float32)")
    return logits[:, -1:] if last else logits


def chunks(ids: Tensor, size: int) -> Iterator[Tensor]:
    """ids (rows, tokens) in pieces of at most `size` tokens."""
    return iter(ids.split(size, dim=1))


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, ids: Tensor, cache: Cache, *, chunk: int, tokens: int) -> Tensor:
    """Read prompts (rows, tokens) of one length in chunks, then take the likeliest token, so many times.

    Returns: (rows, tokens) int64, on the CPU. Raises: ValueError when the model puts out NaN or infinity.
    """
    logits = None
    for piece in chunks(ids, chunk):
        logits = step(model, piece, cache, last=True)
    assert logits is not None
    made = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(tokens - 1):
        made.append(step(model, made[-1], cache, last=True)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(made, 1).cpu()
