"""The shape of a model's key-value cache, and which models can have a quantized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from laconic.checkpoint.files import first_line
from laconic.structure.config_keys import BASE
from laconic.structure.widths import block_configs

_FIX = "; use the model's own cache"
# Layers of transformers' cache that hold keys and values alone.
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
_RECURRENT = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "xlstm")


@dataclass(frozen=True)
class KvShape:
    """The shape of a model's cache.

    Attributes:
        layers: Number of decoder layers.
        heads: Key-value heads of a layer.
        channels: Channels of a head.
        windows: Number of tokens that a token attends to in each layer (None: all).
        context: Largest number of tokens of a text; None if the config does not have it.
    """

    layers: int
    heads: int
    channels: int
    windows: tuple[int | None, ...]
    context: int | None = None


def kv_shape(config: Any) -> KvShape:
    """Return the shape of a model's cache.

    Args:
        config: Config of the model.

    Raises:
        ValueError: The model's cache is something else than keys and values of one shape: latent attention,
            state-space or recurrent layers, heads that differ between layers, an encoder.
    """
    text = config.get_text_config()
    model_type = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"'{model_type}' is an encoder and a decoder, and a quantized cache is for decoders alone{_FIX}"
        )
    try:
        shape = _shape(text, model_type)
        # The cache that transformers itself makes shows what no name in the config does.
        layer_classes = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    except KeyError as e:
        raise ValueError(
            f"'{model_type}' has a cache of its own ({first_line(e)}), which a quantized one is not for{_FIX}"
        ) from e
    except (AttributeError, RuntimeError) as e:
        # transformers raises RuntimeError for a number that differs between layers.
        reason = first_line(e).partition(". ")[0]
        raise ValueError(
            f"'{model_type}' does not have one shape for the keys and values of all its layers: {reason}{_FIX}"
        ) from e
    if any("LinearAttention" in name for name in layer_classes):
        raise _recurrent(model_type)
    if others := [name for name in layer_classes if name not in _LAYERS]:
        raise ValueError(f"'{model_type}' has a cache of its own ({others[0]}), which a quantized one is not for{_FIX}")
    return shape


def _shape(text: Any, model_type: str) -> KvShape:
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"'{model_type}' caches latent vectors (MLA), not keys and values; a quantized cache is not for it{_FIX}"
        )
    # Without layer types a window is that of every layer (Mistral).
    type_of_all = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    types = getattr(text, "layer_types", None) or [type_of_all] * text.num_hidden_layers
    has_mamba = any(name.startswith("mamba_") for name in vars(text))
    if has_mamba or any(word in t for t in (*types, model_type) for word in _RECURRENT):
        raise _recurrent(model_type)
    heads = {_key_value_heads(block) for block in block_configs(text)}
    if len(heads) > 1:
        raise ValueError(
            f"blocks of this model have {min(heads)} to {max(heads)} key-value heads, and a quantized cache needs the "
            "same number in all; prune with uniform: true, or with groups: [mlp]"
        )
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    windows = tuple(window if "sliding" in t or "chunked" in t else None for t in types)
    context = getattr(text, "max_position_embeddings", None)
    context = context if context is None or context > 0 else None
    return KvShape(text.num_hidden_layers, heads.pop(), channels, windows, context)


def _recurrent(model_type: str) -> ValueError:
    return ValueError(f"'{model_type}' has state-space or recurrent layers, which a quantized cache is not for{_FIX}")


def _key_value_heads(config: Any) -> int:
    count: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    model_type = getattr(config, BASE, config.model_type)
    if model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else count
    if model_type == "gpt_bigcode" and config.multi_query:
        return 1
    return int(config.attn_config.kv_n_heads) if model_type == "dbrx" else count
