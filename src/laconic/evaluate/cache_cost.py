"""What a cache takes: bytes, counted on what is really stored, and tokens a second that a model decodes with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from laconic.evaluate.through_cache import Caches, step
from laconic.kv.cache import KvCache
from laconic.kv.open import KvShape, kv_shape


@dataclass(frozen=True)
class Memory:
    """request_bytes: of one request of so many tokens; batch_bytes: of `batch` of them in one cache. bits: of one
    number of keys and values, everything that is kept included."""

    length: int
    request_bytes: int
    batch: int
    batch_bytes: int
    bits: float


@dataclass(frozen=True)
class Speed:
    """tokens_per_second: that a model decodes, one at a time for every row, after so many tokens. milliseconds: of a
    step, the mean of `steps`."""

    length: int
    tokens_per_second: float
    milliseconds: float
    steps: int


def memory_by_length(
    model: PreTrainedModel, caches: Caches, lengths: Sequence[int], *, batch: int = 8
) -> dict[str, list[Memory]]:
    """Of every cache, what it keeps of so many tokens, of keys and values of 16 bit (bfloat16 for a model in float32).

    Caches are really filled, with noise, since how much is stored depends on no value.
    """
    dtype = model.dtype if model.dtype.itemsize == 2 else torch.bfloat16
    shape = kv_shape(model.config)
    found: dict[str, list[Memory]] = {name: [] for name in caches}
    for name, new_cache in caches.items():
        for length in lengths:
            one, two = (stored_bytes(filled(new_cache(), shape, rows, length, dtype, model.device)) for rows in (1, 2))
            # What rows share (positions) is there once.
            whole = one + (batch - 1) * (two - one)
            seen = sum(min(length, window - 1) if window else length for window in shape.windows)
            numbers = 2 * seen * shape.heads * shape.channels
            found[name].append(Memory(length, one, batch, whole, 8 * one / numbers))
    return found


@torch.no_grad()
def speed_by_length(
    model: PreTrainedModel, caches: Caches, lengths: Sequence[int], *, steps: int = 32, batch: int = 1
) -> dict[str, list[Speed]]:
    """Of every cache, how fast a model decodes after so many tokens, which are noise put into the cache.

    steps: tokens that are timed, after two that are not; of 32, some fill a group, which is then encoded.
    Raises: ValueError when the model puts out NaN or infinity.
    """
    shape = kv_shape(model.config)
    found: dict[str, list[Speed]] = {name: [] for name in caches}
    for length in lengths:
        for name, new_cache in caches.items():
            cache = filled(new_cache(), shape, batch, length, model.dtype, model.device)
            ids = torch.zeros(batch, 1, dtype=torch.long)
            for _ in range(2):
                step(model, ids, cache, last=True)
            begun = _now(model.device)
            for _ in range(steps):
                step(model, ids, cache, last=True)
            took = (_now(model.device) - begun) / steps
            found[name].append(Speed(length, batch / took, 1000 * took, steps))
    return found


@torch.no_grad()
def filled(
    cache: Cache, shape: KvShape, rows: int, length: int, dtype: torch.dtype, device: torch.device, chunk: int = 4096
) -> Cache:
    """A cache that has taken in so many tokens of noise, in chunks."""
    noise = torch.Generator().manual_seed(0)
    for at in range(0, length, chunk):
        tokens = min(chunk, length - at)
        x = torch.randn(2, rows, shape.heads, tokens, shape.channels, generator=noise).to(device, dtype)
        if isinstance(cache, KvCache):
            cache.places.begin(at, tokens, None, None)
        for layer in range(shape.layers):
            cache.update(x[0], x[1], layer)
    return cache


def stored_bytes(cache: Cache) -> int:
    """Bytes of all that a cache of ours or of transformers keeps in tensors."""
    if isinstance(cache, KvCache):
        return cache.stored_bytes()
    return sum(t.nbytes for layer in cache.layers for held in vars(layer).values() for t in _plain_tensors(held))


def _plain_tensors(held: Any) -> Iterator[Tensor]:
    """Of what a layer holds, the tensors that lie in memory: those in tuples and mappings, and those that a quantized
    tensor, which passes for one of its dense shape, is made of. Single numbers are no part of what is kept of tokens.
    """
    if isinstance(held, tuple | list | Mapping):
        for part in held.values() if isinstance(held, Mapping) else held:
            yield from _plain_tensors(part)
    elif hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(held, name))
    elif isinstance(held, Tensor) and held.dim():
        yield held


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
