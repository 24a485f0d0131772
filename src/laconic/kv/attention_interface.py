"""The attention function of models that read a quantized cache: packed where the kernel can, decoded elsewhere.

It replaces `sdpa` in transformers' attention interface, and calls `sdpa` for everything but a few new tokens that
attend to a quantized cache.

Axes: B sequences, Q query heads, H key-value heads, R query heads that share one, N new tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from laconic.kv.attention import kv_attention
from laconic.kv.lazy import LazyTensor
from laconic.kv.packed import MAX_QUERIES, KeysValues, LayerHistory, PackedGroup, PackedHistory, kernel_runs_on
from laconic.solvers.rotate import Rotations, rotate
from laconic.structure.anatomy import decoder_of

NAME = "laconic_packed"

# Arguments that change scores in a way that the kernel does not implement.
_SCORE_ARGUMENTS = ("softcap", "position_bias", "s_aux")


def read_packed(model: PreTrainedModel) -> bool:
    """Make a model's attention read packed caches, if it can.

    It can where the kernel runs, the model goes through transformers' attention interface by `sdpa`, and its masks hide
    nothing but padding and tokens out of a sliding window.

    Args:
        model: The model; its config is changed if it can.

    Returns:
        Whether it can.
    """
    config = decoder_of(model).config
    if config._attn_implementation == NAME:
        return True
    chunked = any("chunked" in layer_type for layer_type in getattr(config, "layer_types", None) or ())
    if not model._supports_attention_backend or config._attn_implementation != "sdpa" or chunked:
        return False
    if not kernel_runs_on(model.device):
        return False
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    return True


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention, as transformers' attention interface asks for it.

    Args:
        module: The model's attention.
        query: (B, Q, N, C).
        key: (B, H, T, C); a lazy tensor is read packed where the kernel computes the same.
        value: (B, H, T, C), lazy if the key is.
        attention_mask: Mask of `sdpa`.
        **kwargs: Other arguments of `sdpa`.

    Returns:
        (B, N, Q, C), and no attention weights.
    """
    if isinstance(key, LazyTensor) and isinstance(value, LazyTensor):
        layer = key.history.layer
        if _kernel_computes(layer, query, attention_mask, kwargs):
            return layer_attention(layer, query, kwargs.get("scaling")).transpose(1, 2).contiguous(), None
        key, value = key.decoded(), value.decoded()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _kernel_computes(layer: LayerHistory, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the pass is a softmax over all earlier tokens but padding and those out of a sliding window."""
    new = query.shape[2]
    return (
        new == layer.new
        and new * query.shape[1] // layer.heads <= MAX_QUERIES
        and (not layer.sliding or new == 1)
        and layer.only_padding
        and (layer.angles is None or 2 * layer.angles[0].shape[-1] == query.shape[-1])
        and (mask is None or mask.dtype == torch.bool)
        and kwargs.get("is_causal") is not False
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in _SCORE_ARGUMENTS)
    )


def layer_attention(layer: LayerHistory, q_BQNC: Tensor, scaling: float | None) -> Tensor:
    """Compute attention of the newest tokens over one layer's cache.

    Args:
        layer: Tokens that they attend to.
        q_BQNC: Queries of the newest tokens.
        scaling: Factor of the logits, C^-1/2 if None.

    Returns:
        (B, Q, N, C) in the dtype of the queries.
    """
    window, sinks, rotations = layer.window, layer.sinks, layer.rotations
    q = q_BQNC
    # A product is the same after both sides were rotated, and a sum of rotated values is rotated back.
    if rotations:
        q = _rotate_queries(q.float(), rotations[0])
        window, sinks = _rotate_pair(window, rotations), sinks and _rotate_pair(sinks, rotations)
    out: Tensor | None = None
    repeats = q.shape[1] // layer.heads
    for group in layer.groups:
        history = PackedHistory(
            group.keys,
            group.values,
            _heads_of(window, group),
            sinks and _heads_of(sinks, group),
            layer.first_B,
            layer.angles,
        )
        if group.heads is None:
            out = kv_attention(q, history, scaling)
            continue
        heads = list(group.heads)
        q_group = q.unflatten(1, (layer.heads, repeats))[:, heads].flatten(1, 2)
        out = torch.empty_like(q) if out is None else out
        out.unflatten(1, (layer.heads, repeats))[:, heads] = kv_attention(q_group, history, scaling).unflatten(
            1, (-1, repeats)
        )
    assert out is not None
    return _rotate_queries(out, rotations[1].mT).to(q_BQNC.dtype) if rotations else out


def _heads_of(pair: KeysValues, group: PackedGroup) -> KeysValues:
    return pair if group.heads is None else (pair[0][:, list(group.heads)], pair[1][:, list(group.heads)])


def _rotate_pair(pair: KeysValues, rotations: Rotations) -> KeysValues:
    keys, values = (rotate(x.float(), rotation).to(x.dtype) for x, rotation in zip(pair, rotations, strict=True))
    return keys, values


def _rotate_queries(x_BQNC: Tensor, rotation_HCC: Tensor) -> Tensor:
    """Rotate each query head as its key-value head is rotated."""
    if len(rotation_HCC) == 1:
        return x_BQNC @ rotation_HCC
    return rotate(x_BQNC.unflatten(1, (len(rotation_HCC), -1)), rotation_HCC).flatten(1, 2)
