"""The channels of the residual stream: what of every parameter belongs to one, so that the hidden size can shrink.

Found by comparing shapes: transformers builds the model's skeleton with another `hidden_size`, and the axes that change
are the stream's. A model whose head width follows the hidden size changes there too, and is refused; so is one that
scales its embeddings by the hidden size, since without half of its channels it would compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import build_empty_model
from laconic.structure.anatomy import capture_calls, find_blocks
from laconic.structure.config_keys import BASE
from laconic.structure.widths import make_config


def narrower(raw: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """The keys of config.json that say this hidden size, and the width of a head where that would follow from it.

    Raises: ValueError when the config has no such keys.
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


def stream_axes(model: PreTrainedModel, raw: Mapping[str, Any]) -> dict[str, int]:
    """By name of a parameter, which of its axes is the residual stream's.

    Raises: ValueError when the hidden size of this kind of model cannot change alone.
    """
    kind = raw.get(BASE, raw["model_type"])
    refused = ValueError(
        f"the hidden channels of '{kind}' cannot be pruned: more follows from its hidden size; set groups: [mlp], or "
        "use depth"
    )
    hidden = model.config.get_text_config().hidden_size
    # Half, so that whatever must divide it still does.
    try:
        whole, other = (
            build_empty_model(raw, model.dtype),
            build_empty_model({**raw, **narrower(raw, hidden // 2)}, model.dtype),
        )
    except ValueError as e:
        raise refused from e
    shapes = {n: p.shape for n, p in other.named_parameters(remove_duplicate=False)}
    axes: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sizes = zip(parameter.shape, shapes[name], strict=True)
        changed = [axis for axis, (before, after) in enumerate(sizes) if before != after]
        if len(changed) > 1 or any(parameter.shape[axis] != hidden for axis in changed):
            raise refused
        if changed:
            axes[name] = changed[0]
    if not torch.equal(_entering(whole), _entering(other)):
        raise refused
    return axes


def _entering(model: PreTrainedModel) -> Tensor:
    """What a channel of the stream is where it begins, if all embeddings are one: another number where they are scaled
    by how many there are."""
    embed: Any = model.get_input_embeddings()
    ones = torch.ones((), dtype=torch.float32).expand(embed.weight.shape)
    embed.weight = nn.Parameter(ones, requires_grad=False)
    hidden, _ = capture_calls(model, find_blocks(model), input_ids=torch.zeros(1, 2, dtype=torch.long))
    return hidden[..., 0].float()


def without_channels(tensors: Mapping[str, Tensor], axes: Mapping[str, int], kept: Tensor) -> dict[str, Tensor]:
    """Parameters by name, without the channels that are not kept; tied ones stay one tensor. kept: (hidden,) bool."""
    index, made = kept.nonzero()[:, 0], dict[tuple[int, int], Tensor]()
    out = dict(tensors)
    for name, axis in axes.items():
        tensor = tensors[name]
        key = (id(tensor), axis)
        if key not in made:
            made[key] = tensor.detach().index_select(axis, index.to(tensor.device))
        out[name] = made[key]
    return out


def by_channel(changes: Tensor, axis: int, *, vector: bool) -> Tensor:
    """The importance of each channel's part of a parameter, (hidden,) float64: what single weights do, added up; or
    what they do together. changes: as from `methods.llm_pruner.saliency.taylor`."""
    lines = changes.double().movedim(axis, 0).reshape(changes.shape[axis], -1)
    return lines.sum(1).abs() if vector else lines.abs().sum(1)


def kept_channels(importance: Tensor, sparsity: float, step: int) -> Tensor:
    """The channels of most importance: all of them, or a multiple of `step`, one step at least: (hidden,) bool."""
    count = len(importance)
    left = min(count, max(step, round(count * (1 - sparsity) / step) * step)) if sparsity else count
    mask = torch.zeros(count, dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:left].cpu()] = True
    return mask
