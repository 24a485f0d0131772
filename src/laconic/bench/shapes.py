"""Shapes to measure: of linears that an engine multiplies by, and of whole models of no weights of their own."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from laconic.checkpoint.source import build_skeleton, model_folder, read_config
from laconic.structure.anatomy import dissect, linears_of

Shape = tuple[int, int]
"""(out, in)."""

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


def config_of(name: str) -> PretrainedConfig:
    """Of a preset, or of a model. Raises: ValueError when it is neither."""
    if name in PRESETS:
        return deepcopy(PRESETS[name])
    raw, config = read_config(model_folder(name))
    if "quantization_config" in raw:
        del config.quantization_config
    return config


def linear_shapes(config: PretrainedConfig) -> dict[Shape, str]:
    """The linears of a block, with the names that have each shape; what reads one tensor (q, k, v; gate, up) is
    stacked, as engines multiply it. Experts are counted one by one."""
    model = build_skeleton(config, torch.bfloat16)
    anatomy = dissect(model)
    found: dict[Shape, str] = {}
    for i, taps in enumerate(anatomy.taps):
        linears = linears_of(model.get_submodule(anatomy.block_name(i)))
        for tap in taps:
            shape = sum(linears[n].weight.shape[0] for n in tap.linears), linears[tap.linears[0]].weight.shape[1]
            found.setdefault(shape, "+".join(n.rpartition(".")[2] for n in tap.linears))
    return found


def read_shapes(text: str) -> dict[Shape, str]:
    """`4096x14336,...`, each out x in. Raises: ValueError for anything else."""
    found: dict[Shape, str] = {}
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(
                f"--shapes {part} is no shape; write outputs x inputs, as in --shapes 4096x14336,4096x4096"
            )
        found[int(numbers[0]), int(numbers[1])] = part.strip()
    return found


def scaled(config: PretrainedConfig, hidden: int) -> PretrainedConfig:
    """The same architecture at another hidden size: as many blocks, heads of the same size, all else in proportion.

    Raises: ValueError for a size that does not hold whole groups of heads.
    """
    heads, kv = _heads(config)
    size = _head_dim(config)
    group = heads // kv * size
    if hidden < group or hidden % group:
        raise ValueError(f"--scaled {hidden} is no multiple of {group}, a group of heads of this model")
    wide = deepcopy(config)
    wide.head_dim = size
    wide.num_attention_heads, wide.num_key_value_heads = hidden // size, hidden // group
    wide.intermediate_size = round(config.intermediate_size * hidden / config.hidden_size / 64) * 64
    wide.hidden_size = hidden
    return wide


def narrower(config: PretrainedConfig, sparsity: float) -> PretrainedConfig:
    """The same model after structured pruning: this share of the MLP's channels (to the nearest 16) and of the heads
    (to the nearest group) is gone from every block.

    Raises: ValueError when nothing would be gone, or all of the heads.
    """
    heads, kv = _heads(config)
    left = round(kv * (1 - sparsity))
    channels = round(config.intermediate_size * (1 - sparsity) / 16) * 16
    if left < 1 or not 0 < channels < config.intermediate_size:
        raise ValueError(
            f"a share of {sparsity} cannot be cut from {kv} groups of heads and {config.intermediate_size} channels; "
            "choose another sparsity, or --scaled to a larger size"
        )
    thin = deepcopy(config)
    thin.head_dim = _head_dim(config)
    thin.num_attention_heads, thin.num_key_value_heads = heads // kv * left, left
    thin.intermediate_size = channels
    return thin


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or not hasattr(config, "intermediate_size"):
        raise ValueError(
            f"models of type '{config.model_type}' cannot be scaled or cut by their config; take a Llama's"
        )
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
