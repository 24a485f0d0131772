"""Shapes to measure: linears as an engine multiplies them, and configs of whole models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from laconic.checkpoint.source import build_skeleton, model_folder, read_config
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.structure.anatomy import dissect, linears_of

Shape = tuple[int, int]
"""Shape (out, in) of a weight."""

_LLAMA: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
PRESETS: Mapping[str, LlamaConfig] = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        **_LLAMA,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        **_LLAMA,
    ),
}


def config_of(name: str, *, trust: Trust = UNTRUSTED) -> PretrainedConfig:
    """Return the config of a preset or of a model, without quantization.

    Args:
        name: A preset, a folder, or a name on the Hub.
        trust: Permissions of the model's files.

    Raises:
        ValueError: The name is neither a preset nor a model.
    """
    if name in PRESETS:
        return deepcopy(PRESETS[name])
    raw, config = read_config(model_folder(name, trust=trust), trust=trust)
    if "quantization_config" in raw:
        del config.quantization_config
    return config


def linear_shapes(config: PretrainedConfig, *, trust: Trust = UNTRUSTED) -> dict[Shape, str]:
    """Return the shapes of the linears of a model's blocks, with the names of the linears.

    Linears that read one tensor (q, k, v; gate, up) are stacked, as engines multiply them. Experts are single linears.

    Args:
        config: Config of the model, of which no weights are needed.
        trust: Permissions of the model's files.
    """
    model = build_skeleton(config, torch.bfloat16, trust=trust)
    anatomy = dissect(model)
    shapes: dict[Shape, str] = {}
    for i, taps in enumerate(anatomy.taps):
        linears = linears_of(model.get_submodule(anatomy.block_name(i)))
        for tap in taps:
            shape = sum(linears[n].weight.shape[0] for n in tap.linears), linears[tap.linears[0]].weight.shape[1]
            shapes.setdefault(shape, "+".join(n.rpartition(".")[2] for n in tap.linears))
    return shapes


def parse_shapes(text: str) -> dict[Shape, str]:
    """Parse the text of a `--shapes`.

    Args:
        text: Shapes separated by commas, each outputs x inputs, such as `4096x14336,4096x4096`.

    Returns:
        By shape (out, in), its text.

    Raises:
        ValueError: A part does not have this form, or a size is 0.
    """
    shapes: dict[Shape, str] = {}
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(
                f"--shapes {part} is not a shape; write outputs x inputs, as in --shapes 4096x14336,4096x4096"
            )
        shapes[int(numbers[0]), int(numbers[1])] = part.strip()
    return shapes


def scaled(config: PretrainedConfig, hidden: int) -> PretrainedConfig:
    """Scale an architecture to another hidden size.

    The number of blocks and the size of a head stay; everything else is in proportion.

    Args:
        config: Config of a model.
        hidden: The new hidden size.

    Returns:
        A new config.

    Raises:
        ValueError: The hidden size is not a multiple of a group of heads.
    """
    heads, kv_heads = _heads(config)
    head_dim = _head_dim(config)
    group = heads // kv_heads * head_dim
    if hidden < group or hidden % group:
        raise ValueError(
            f"--scaled {hidden} is not a multiple of {group}, the width of a group of heads of this model; choose one"
        )
    result = deepcopy(config)
    result.head_dim = head_dim
    result.num_attention_heads, result.num_key_value_heads = hidden // head_dim, hidden // group
    result.intermediate_size = round(config.intermediate_size * hidden / config.hidden_size / 64) * 64
    result.hidden_size = hidden
    return result


def narrowed(config: PretrainedConfig, sparsity: float) -> PretrainedConfig:
    """Return the config after structured pruning of every block.

    Args:
        config: Config of a model.
        sparsity: Share of the MLP's channels to remove, to the nearest multiple of 16, and of the groups of heads.

    Returns:
        A new config.

    Raises:
        ValueError: Nothing would be removed, or all heads.
    """
    heads, kv_heads = _heads(config)
    groups = round(kv_heads * (1 - sparsity))
    channels = round(config.intermediate_size * (1 - sparsity) / 16) * 16
    if groups < 1 or not 0 < channels < config.intermediate_size:
        raise ValueError(
            f"a share of {sparsity} cannot be cut from {kv_heads} groups of heads and {config.intermediate_size} "
            "channels; choose another sparsity, or --scaled to a larger size"
        )
    result = deepcopy(config)
    result.head_dim = _head_dim(config)
    result.num_attention_heads, result.num_key_value_heads = heads // kv_heads * groups, groups
    result.intermediate_size = channels
    return result


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or not hasattr(config, "intermediate_size"):
        raise ValueError(
            f"models of type '{config.model_type}' cannot be scaled or cut by their config; take one of type 'llama'"
        )
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
