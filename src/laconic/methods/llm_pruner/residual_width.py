"""Channels of the residual stream: the axis of every parameter that belongs to them, so that `hidden_size` can shrink.

The axes are found by comparing shapes: transformers builds a skeleton of the model with another `hidden_size`, and the
axes that change belong to the residual stream. A model whose head width follows the hidden size changes in other axes
too, and is rejected; so is one that scales its embeddings by the hidden size, since it would compute something else
with fewer channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import build_empty_model
from laconic.structure.anatomy import find_blocks
from laconic.structure.calls import capture_calls
from laconic.structure.config_keys import BASE
from laconic.structure.widths import make_config


def hidden_size_keys(raw: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """Make the keys of config.json for another hidden size, with the head width if it would follow from it.

    Args:
        raw: Contents of config.json.
        hidden: The new hidden size.

    Returns:
        The keys that change, with their values.

    Raises:
        ValueError: The model is more than a language model.
    """
    config = make_config(raw)
    text = config.get_text_config()
    if text is not config:
        raise ValueError(f"'{raw['model_type']}' is more than a language model; llm_pruner prunes plain ones")
    changed = {text.attribute_map.get("hidden_size", "hidden_size"): hidden}
    head_dim = getattr(text, "head_dim", None)
    if head_dim is not None:
        changed["head_dim"] = head_dim
    return changed


def residual_axes(model: PreTrainedModel, raw: Mapping[str, Any]) -> dict[str, int]:
    """Find the axis of each parameter that belongs to the residual stream.

    Args:
        model: The model; its parameters may be on the meta device.
        raw: Contents of config.json.

    Returns:
        The axis by name of parameter, for those that have one.

    Raises:
        ValueError: The hidden size of this kind of model cannot change alone.
    """
    kind = raw.get(BASE, raw["model_type"])
    unsupported = ValueError(
        f"the hidden channels of '{kind}' cannot be pruned: more follows from its hidden size; set groups: [mlp], or "
        "use depth"
    )
    hidden = model.config.get_text_config().hidden_size
    # Half of it, so that numbers that must divide the hidden size still do.
    try:
        original = build_empty_model(raw, model.dtype)
        halved = build_empty_model({**raw, **hidden_size_keys(raw, hidden // 2)}, model.dtype)
    except ValueError as e:
        raise unsupported from e
    shapes = {n: p.shape for n, p in halved.named_parameters(remove_duplicate=False)}
    axes: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sizes = zip(parameter.shape, shapes[name], strict=True)
        changed = [axis for axis, (before, after) in enumerate(sizes) if before != after]
        if len(changed) > 1 or any(parameter.shape[axis] != hidden for axis in changed):
            raise unsupported
        if changed:
            axes[name] = changed[0]
    if not torch.equal(_embedding_scale(original), _embedding_scale(halved)):
        raise unsupported
    return axes


def _embedding_scale(model: PreTrainedModel) -> Tensor:
    """Compute the input of the first block in one channel if all embeddings are one: the factor that scales them."""
    embed: Any = model.get_input_embeddings()
    ones = torch.ones((), dtype=torch.float32).expand(embed.weight.shape)
    embed.weight = nn.Parameter(ones, requires_grad=False)
    hidden, _ = capture_calls(model, find_blocks(model), input_ids=torch.zeros(1, 2, dtype=torch.long))
    return hidden[..., 0].float()


def remove_channels(tensors: Mapping[str, Tensor], axes: Mapping[str, int], keep: Tensor) -> dict[str, Tensor]:
    """Remove channels of the residual stream from parameters; tied ones remain one tensor.

    Args:
        tensors: Parameters and buffers by name.
        axes: Axis of the residual stream by name, of `residual_axes`.
        keep: (hidden,) bool, channels that remain.

    Returns:
        All tensors by name; those without an axis are the same objects.
    """
    index, narrowed = keep.nonzero()[:, 0], dict[tuple[int, int], Tensor]()
    out = dict(tensors)
    for name, axis in axes.items():
        tensor = tensors[name]
        key = (id(tensor), axis)
        if key not in narrowed:
            narrowed[key] = tensor.detach().index_select(axis, index.to(tensor.device))
        out[name] = narrowed[key]
    return out


def channel_importance(terms: Tensor, axis: int, *, vector: bool) -> Tensor:
    """Compute the importance of each residual channel's part of a parameter.

    Args:
        terms: A term per weight, of `saliency.taylor_terms`.
        axis: Axis of the residual stream.
        vector: Whether to take the absolute sum of a channel's terms, instead of the sum of absolute terms.

    Returns:
        (hidden,) float64.
    """
    lines = terms.double().movedim(axis, 0).reshape(terms.shape[axis], -1)
    return lines.sum(1).abs() if vector else lines.abs().sum(1)


def choose_channels(importance: Tensor, sparsity: float, step: int) -> Tensor:
    """Choose the most important channels.

    Args:
        importance: (hidden,).
        sparsity: Share of channels to remove; 0 keeps all.
        step: The number that remains is a multiple of it, and not zero.

    Returns:
        (hidden,) bool, True for channels that remain.
    """
    count = len(importance)
    remaining = min(count, max(step, round(count * (1 - sparsity) / step) * step)) if sparsity else count
    mask = torch.zeros(count, dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:remaining].cpu()] = True
    return mask
