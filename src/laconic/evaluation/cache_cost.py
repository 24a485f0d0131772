"""Cost of a cache: its bytes, counted on the stored tensors, and the decoding speed of a model with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from laconic.evaluation.through_cache import Caches, step
from laconic.kv.cache import KvCache
from laconic.kv.shape import KvShape, kv_shape


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache of `length` tokens.

    Attributes:
        length: Tokens of a request.
        request_bytes: Bytes of one request.
        batch: Number of requests of a batch.
        batch_bytes: Bytes of the batch.
        bits: Bits per number of keys and values, including all parameters.
    """

    length: int
    request_bytes: int
    batch: int
    batch_bytes: int
    bits: float


@dataclass(frozen=True)
class Speed:
    """Decoding speed after `length` tokens, one new token per row and step.

    Attributes:
        length: Tokens in the cache.
        tokens_per_second: Tokens of all rows per second.
        milliseconds: Mean time of a step.
        steps: Number of timed steps.
    """

    length: int
    tokens_per_second: float
    milliseconds: float
    steps: int


def memory_by_length(
    model: PreTrainedModel, caches: Caches, lengths: Sequence[int], *, batch: int = 8
) -> dict[str, list[Memory]]:
    """Measure the bytes of each cache after filling it with noise; the number of bytes does not depend on values.

    Args:
        model: The model. For a model in float32, keys and values are bfloat16.
        caches: The caches.
        lengths: Numbers of tokens.
        batch: Number of requests of a batch.

    Returns:
        By cache, one entry per length.
    """
    dtype = model.dtype if model.dtype.itemsize == 2 else torch.bfloat16
    shape = kv_shape(model.config)
    results: dict[str, list[Memory]] = {name: [] for name in caches}
    for name, new_cache in caches.items():
        for length in lengths:
            one, two = (stored_bytes(filled(new_cache(), shape, rows, length, dtype, model.device)) for rows in (1, 2))
            # Positions are shared by all rows, so bytes are not proportional to rows.
            total = one + (batch - 1) * (two - one)
            visible = sum(min(length, window - 1) if window else length for window in shape.windows)
            numbers = 2 * visible * shape.heads * shape.channels
            results[name].append(Memory(length, one, batch, total, 8 * one / numbers))
    return results


@torch.no_grad()
def speed_by_length(
    model: PreTrainedModel, caches: Caches, lengths: Sequence[int], *, steps: int = 32, batch: int = 1
) -> dict[str, list[Speed]]:
    """Measure the decoding speed with each cache after filling it with noise.

    Args:
        model: The model.
        caches: The caches.
        lengths: Numbers of tokens in the cache.
        steps: Timed steps, after two that are not timed. 32 steps include the encoding of filled groups.
        batch: Number of rows.

    Returns:
        By cache, one entry per length.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    shape = kv_shape(model.config)
    results: dict[str, list[Speed]] = {name: [] for name in caches}
    for length in lengths:
        for name, new_cache in caches.items():
            cache = filled(new_cache(), shape, batch, length, model.dtype, model.device)
            ids = torch.zeros(batch, 1, dtype=torch.long)
            for _ in range(2):
                step(model, ids, cache, last=True)
            start = _now(model.device)
            for _ in range(steps):
                step(model, ids, cache, last=True)
            seconds = (_now(model.device) - start) / steps
            results[name].append(Speed(length, batch / seconds, 1000 * seconds, steps))
    return results


@torch.no_grad()
def filled(
    cache: Cache, shape: KvShape, rows: int, length: int, dtype: torch.dtype, device: torch.device, *, chunk: int = 4096
) -> Cache:
    """Fill a cache with noise.

    Args:
        cache: An empty cache.
        shape: Layers, heads and channels of the model's cache.
        rows: Number of rows.
        length: Number of tokens.
        dtype: Dtype of keys and values.
        device: Device of keys and values.
        chunk: Tokens per update.

    Returns:
        The same cache.
    """
    generator = torch.Generator().manual_seed(0)
    for start in range(0, length, chunk):
        tokens = min(chunk, length - start)
        x = torch.randn(2, rows, shape.heads, tokens, shape.channels, generator=generator).to(device, dtype)
        if isinstance(cache, KvCache):
            cache.positions.begin_pass(start, tokens, None, None)
        for layer in range(shape.layers):
            cache.update(x[0], x[1], layer)
    return cache


def stored_bytes(cache: Cache) -> int:
    """Count the bytes of all tensors of a cache.

    Args:
        cache: A cache of Laconic or of transformers. Of the latter, scalars are not counted, and quantized tensor
            subclasses count with their components.

    Returns:
        Number of bytes.
    """
    if isinstance(cache, KvCache):
        return cache.stored_bytes()
    return sum(t.nbytes for layer in cache.layers for value in vars(layer).values() for t in _plain_tensors(value))


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in memory of an attribute of a cache layer.

    Tuples and mappings are searched. A quantized tensor subclass, which reports the shape of its dense tensor, is
    replaced by its components. Scalars are skipped: they do not grow with the tokens.
    """
    if isinstance(value, tuple | list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _plain_tensors(part)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor) and value.dim():
        yield value


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
