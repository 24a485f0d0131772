"""Looking into attention: queries, keys and values of a block on the calibration set, and what rounding them costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from laconic.calibrate.stream import Stream
from laconic.kv.format import KvFormat, decode_kv, encode_kv
from laconic.kv.positions import Places
from laconic.solvers.rotate import turned
from laconic.structure.anatomy import BlockCall

_NAME = "laconic_seen"

# Calibration samples looked at: a cache's ranges and levels have few numbers.
_SAMPLES = 16
# Queries whose weights are looked at, of each sample: the square of the length would be much.
_QUERIES = 256


@dataclass(frozen=True)
class Seen:
    """queries: (samples, query heads, tokens, channels); keys, values: (samples, heads, tokens, channels); stored_keys:
    keys as they are stored, before their rotary embedding if so; stored_queries: queries likewise. All float32.
    scaling: of the products of queries and keys. places: to put the rotary embedding back, for layer `number`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    stored_keys: Tensor
    stored_queries: Tensor
    scaling: float
    places: Places | None
    number: int

    def attended(self, keys: Tensor, values: Tensor) -> Tensor:
        """What attention puts out for some of the queries: (samples, query heads, queries, channels)."""
        made: Tensor = self.weights(keys) @ self._per_query(values)
        return made

    @cached_property
    def output(self) -> Tensor:
        """What attention puts out as it is, against which every error is measured."""
        return self.attended(self.keys, self.values)

    def weights(self, keys: Tensor) -> Tensor:
        """Attention's weights for evenly spaced queries, causal: (samples, query heads, queries, tokens)."""
        tokens, picked = keys.shape[2], self.picked()
        scores = self.queries[:, :, picked] @ self._per_query(keys).transpose(-1, -2) * self.scaling
        later = torch.arange(tokens, device=keys.device) > picked[:, None]
        made: Tensor = scores.masked_fill_(later, -math.inf).softmax(-1)
        return made

    def picked(self) -> Tensor:
        """Which queries are looked at."""
        tokens = self.keys.shape[2]
        return torch.linspace(tokens // 4, tokens - 1, min(_QUERIES, tokens), device=self.keys.device).long()

    def _per_query(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.queries.shape[1] // x.shape[1], 1)


def key_weight(seen: Seen, turn: Tensor | None = None) -> Tensor:
    """What a squared error of a stored key's channel costs (samples, heads, tokens, channels): to first order, the
    squares of the weights that queries give the token, times the squares of their channel, summed. turn: of channels,
    before they are stored, (heads or 1, channels, channels).

    Tokens that are attended to are the far ones of their channels: without these weights ranges would cut them off. A
    query meets a key from before its rotary embedding at many angles, so it counts with the mean of its two halves.
    """
    heads, queries = seen.keys.shape[1], seen.stored_queries[:, :, seen.picked()]
    if turn is not None and seen.places is None:
        queries = turned(queries.unflatten(1, (heads, -1)), turn).flatten(1, 2)
    energy = queries.square()
    if seen.places is not None:
        energy = (energy + energy.roll(energy.shape[-1] // 2, -1)) / 2
    cost = seen.weights(seen.keys).square().transpose(-1, -2) @ energy
    per_head: Tensor = cost.unflatten(1, (heads, -1)).mean(2)
    if turn is not None and seen.places is not None:
        per_head = turned(per_head, turn.square())
    return per_head.clamp(min=1e-20)


def value_weight(seen: Seen) -> Tensor:
    """What a squared error of a token's value costs: the squares of the weights that it gets, summed (samples, heads,
    tokens, 1)."""
    weights = seen.weights(seen.keys).square().sum(2)
    per_head: Tensor = weights.unflatten(1, (seen.keys.shape[1], -1)).mean(2).unsqueeze(-1)
    return per_head.clamp(min=1e-12)


def query_cost(seen: Seen) -> Tensor:
    """What an error e in a head's stored keys costs, e' S e (heads, channels, channels): to first order, queries by
    queries, each as often as it gives weight to few tokens (the squares of its weights, summed).

    Of keys from before their rotary embedding the diagonal alone is left, as `key_weight` has it: whatever else there
    is, the angles at which keys are met average away.
    """
    heads, queries = seen.keys.shape[1], seen.stored_queries[:, :, seen.picked()]
    mass = seen.weights(seen.keys).square().sum(-1, keepdim=True)
    if seen.places is not None:
        energy = (queries.square() * mass).sum((0, 2)).unflatten(0, (heads, -1)).sum(1)
        return torch.diag_embed((energy + energy.roll(energy.shape[-1] // 2, -1)) / 2)
    cost: Tensor = ((queries * mass).mT @ queries).sum(0).unflatten(0, (heads, -1)).sum(1)
    return cost


def attention_error(
    seen: Seen, which: str, fmt: KvFormat, static: dict[str, Tensor], turn: Tensor | None = None
) -> Tensor:
    """||o' - o||^2 / ||o||^2 of each key-value head (heads,), when its `keys`, or `values`, are stored so and
    nothing else is. turn: of channels, before they are stored, (heads or 1, channels, channels)."""
    x = seen.stored_keys if which == "keys" else seen.values
    whole = x.shape[2] // fmt.tokens_at_once * fmt.tokens_at_once
    stored = x[:, :, :whole] if turn is None else turned(x[:, :, :whole], turn)
    back = decode_kv(fmt, encode_kv(fmt, stored, static, torch.float32), x.shape[-1], static)
    back = torch.cat([back if turn is None else turned(back, turn.mT), x[:, :, whole:]], 2)
    if which == "values":
        made = seen.attended(seen.keys, back)
    else:
        keys = seen.places.rotate(back, 0, seen.number) if seen.places else back
        made = seen.attended(keys, seen.values)
    groups = seen.keys.shape[1]
    lost, whole_output = (t.square().sum((0, 2, 3)).view(groups, -1).sum(1) for t in (made - seen.output, seen.output))
    return lost / whole_output.clamp(min=1e-30)


def look(
    block: nn.Module,
    config: Any,
    call: BlockCall,
    stream: Stream,
    device: torch.device,
    places: Places | None,
    number: int,
) -> Seen:
    """Run a block on some of the calibration set and keep what its attention got.

    config: the model's. places: where keys are stored before their rotary embedding.
    Raises: ValueError when the block's attention cannot be looked into.
    """
    picked = torch.linspace(0, len(stream.hidden) - 1, min(_SAMPLES, len(stream.hidden))).long()
    found: list[tuple[Tensor, Tensor, Tensor, float]] = []
    with _watching(config, found):
        for i in picked.unique().tolist():
            call(block, stream.hidden[i : i + 1].to(device))
    if len(found) != len(picked.unique()):
        raise ValueError(
            f"cannot look into the attention of '{config.get_text_config().model_type}', which a calibrated cache "
            "needs; use a tuning-free method (kivi, kv_per_token)"
        )
    queries, keys, values = (torch.cat([x.float() for x in part]) for part in list(zip(*found, strict=True))[:3])
    stored = (keys, queries)
    if places is not None:
        places.cut(0)
        places.begin(0, keys.shape[2], None, None)
        stored = (places.unrotate(keys, 0, number), places.unrotate(queries, 0, number))
    return Seen(queries, keys, values, *stored, found[0][3], places, number)


@contextmanager
def _watching(config: Any, found: list[tuple[Tensor, Tensor, Tensor, float]]) -> Iterator[None]:
    """While this lasts every attention of a model leaves its queries, keys, values and scaling in `found`."""

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        scaling = kwargs.get("scaling")
        found.append((query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, watch)
    text = config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = _NAME
    try:
        yield
    finally:
        text._attn_implementation = before
