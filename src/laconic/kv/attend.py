"""How a model's attention reads a packed cache: as it is stored where the kernel can, decoded where it cannot.

It takes the place of `sdpa` in transformers' attention interface, and is `sdpa` for all but a few new tokens that look
at a cache of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from laconic.kv.attention import MOST_QUERIES, Packed, Pair, kv_attention, runs_on
from laconic.kv.cache import PackedLayer
from laconic.kv.lazy import History, Unread
from laconic.kv.scheme import HeadGroup
from laconic.solvers.rotate import Turns, turned

NAME = "laconic_packed"

# What changes scores, and the kernel does not know.
_SCORING = ("softcap", "position_bias", "s_aux")


def reads_packed(model: PreTrainedModel) -> bool:
    """Have a model's attention read packed caches, if it can; whether it does.

    It can where the kernel runs, and the model goes through transformers' attention interface, by `sdpa`, and hides no
    tokens but padding and those that have left a sliding window.
    """
    config = model.get_decoder().config
    if config._attn_implementation == NAME:
        return True
    chunked = any("chunked" in kind for kind in getattr(config, "layer_types", None) or ())
    if not model._supports_attention_backend or config._attn_implementation != "sdpa" or chunked:
        return False
    if not runs_on(model.device):
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """`sdpa`, in the form of transformers' attention interface; packed keys and values are read as they are."""
    if isinstance(key, Unread) and isinstance(value, Unread):
        history = key.history
        if _plain(history, query, mask, given):
            return attend(history.layer, query, given.get("scaling")).transpose(1, 2).contiguous(), None
        key, value = key.decoded(), value.decoded()
    return sdpa_attention_forward(module, query, key, value, mask, **given)


def _plain(history: History, query: Tensor, mask: Any, given: dict[str, Any]) -> bool:
    """Whether this is what the kernel computes: softmax over all earlier tokens but padding and those out of the
    window."""
    new, layer = query.shape[2], history.layer
    return (
        new == history.new
        and new * query.shape[1] // layer.heads <= MOST_QUERIES
        and (layer.window is None or new == 1)
        and layer.places.only_padding
        and (layer.angles is None or 2 * layer.angles[0].shape[-1] == query.shape[-1])
        and (mask is None or mask.dtype == torch.bool)
        and given.get("is_causal") is not False
        and not given.get("dropout")
        and all(given.get(name) is None for name in _SCORING)
    )


def attend(layer: PackedLayer, query: Tensor, scaling: float | None) -> Tensor:
    """query (batch, query heads, new tokens, channels), of the tokens that a layer took in last -> their attention,
    likewise."""
    window, sinks = (layer.keys, layer.values), layer.sinks
    starts = layer.first_seen(query.shape[0])
    q = query
    # A product is the same after both sides were rotated, and what the sum of rotated values is, is rotated back.
    if layer.turns:
        q = _by_head(q.float(), layer.turns[0])
        window, sinks = _turned(window, layer.turns), sinks and _turned(sinks, layer.turns)
    made: Tensor | None = None
    for g, group in enumerate(layer.groups):
        keys, values = (
            Packed(fmt, stored, layer.static.get(f"{name}.{g}"))
            for name, fmt, stored in zip(("keys", "values"), (group.keys, group.values), layer.packed[g], strict=True)
        )
        some = kv_attention(
            _of_group(q, group, layer.heads),
            keys,
            values,
            _heads(window, group),
            sinks and _heads(sinks, group),
            scaling,
            starts,
            layer.angles,
        )
        if group.heads is None:
            made = some
        else:
            made = torch.empty_like(q) if made is None else made
            rep = q.shape[1] // layer.heads
            made.unflatten(1, (layer.heads, rep))[:, list(group.heads)] = some.unflatten(1, (-1, rep))
    assert made is not None
    return _by_head(made, layer.turns[1].mT).to(query.dtype) if layer.turns else made


def _of_group(q: Tensor, group: HeadGroup, heads: int) -> Tensor:
    return q if group.heads is None else q.unflatten(1, (heads, -1))[:, list(group.heads)].flatten(1, 2)


def _heads(pair: Pair, group: HeadGroup) -> Pair:
    return pair if group.heads is None else (pair[0][:, list(group.heads)], pair[1][:, list(group.heads)])


def _turned(pair: Pair, turns: Turns) -> Pair:
    k, v = (turned(x.float(), turn).to(x.dtype) for x, turn in zip(pair, turns, strict=True))
    return k, v


def _by_head(x: Tensor, turn: Tensor) -> Tensor:
    """x (batch, query heads, tokens, channels), each turned as its key-value head is."""
    return x @ turn if len(turn) == 1 else turned(x.unflatten(1, (len(turn), -1)), turn).flatten(1, 2)
