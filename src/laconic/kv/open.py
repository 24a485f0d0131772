"""Caches for a model: of which shape they must be, and how the model comes to use them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from laconic.checkpoint.files import first_line
from laconic.kv.attend import reads_packed
from laconic.kv.cache import Calibrated, KvCache
from laconic.kv.positions import places_of
from laconic.kv.scheme import KvScheme
from laconic.structure.config_keys import BASE
from laconic.structure.widths import block_configs

_OTHER_STATE = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "xlstm")


@dataclass(frozen=True)
class KvShape:
    """layers; heads: key-value heads a layer; channels: of a head; windows: how many tokens each layer attends to
    (None: all). context: the most tokens of a text, where the config tells."""

    layers: int
    heads: int
    channels: int
    windows: tuple[int | None, ...]
    context: int | None = None


def kv_shape(config: Any) -> KvShape:
    """The shape of a model's cache, by its config.

    Raises: ValueError for models whose cache is something else: latent attention, state-space layers.
    """
    text = config.get_text_config()
    kind = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"'{kind}' is an encoder and a decoder, and a quantized cache is for decoders alone")
    try:
        shape = _shape(text, kind)
        # What transformers itself would keep of it tells of what no name does.
        own = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    except KeyError as e:
        raise ValueError(f"'{kind}' has a cache of its own ({first_line(e)}), which a quantized one is not for") from e
    except (AttributeError, RuntimeError) as e:
        # The latter is transformers' for what is another number in each layer.
        raise ValueError(
            f"'{kind}' does not tell of one shape for all its layers' keys and values: {first_line(e)}"
        ) from e
    if any("LinearAttention" in name for name in own):
        raise ValueError(f"'{kind}' has state-space or recurrent layers, which a quantized cache is not for")
    return shape


def _shape(text: Any, kind: str) -> KvShape:
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"'{kind}' caches latent vectors (MLA), not keys and values; a quantized cache is not for it")
    # Where types are not said, a window is every layer's (Mistral).
    kind_of_all = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    types = getattr(text, "layer_types", None) or [kind_of_all] * text.num_hidden_layers
    beside = any(name.startswith("mamba_") for name in vars(text))
    if beside or any(word in t for t in (*types, kind) for word in _OTHER_STATE):
        raise ValueError(f"'{kind}' has state-space or recurrent layers, which a quantized cache is not for")
    own = {_key_value_heads(block) for block in block_configs(text)}
    if len(own) > 1:
        raise ValueError(
            f"blocks of this model have {min(own)} to {max(own)} key-value heads, and a quantized cache has as many in "
            "all; prune with uniform: true, or with groups: [mlp]"
        )
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    windows = tuple(window if "sliding" in t or "chunked" in t else None for t in types)
    context = getattr(text, "max_position_embeddings", None)
    return KvShape(text.num_hidden_layers, own.pop(), channels, windows, context)


def _key_value_heads(config: Any) -> int:
    count: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kind = getattr(config, BASE, config.model_type)
    if kind == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else count
    if kind == "gpt_bigcode" and config.multi_query:
        return 1
    return int(config.attn_config.kv_n_heads) if kind == "dbrx" else count


def make_cache(model: PreTrainedModel, scheme: KvScheme, calibrated: Calibrated | None = None) -> KvCache:
    """A new, empty cache for one batch: `model.generate(..., past_key_values=cache)`.

    calibrated: what calibration fixed, where the scheme has any of it.
    Raises: ValueError when the model cannot have such a cache, or another model was calibrated.
    """
    shape = kv_shape(model.config)
    scheme.check(shape.layers, shape.heads, shape.channels)
    if scheme.calibrated and calibrated is None:
        raise ValueError(f"a cache of '{scheme.method}' is calibrated; make it by 'laconic compress' and open that")
    if scheme.fingerprint and scheme.fingerprint != fingerprint(_embeddings(model)):
        raise ValueError("this cache was calibrated on another model; calibrate it on this one, by 'laconic compress'")
    _listen(model)
    places = places_of(model, rotary=scheme.pre_rope)
    unread = reads_packed(model)
    return KvCache(scheme, places=places, calibrated=calibrated, windows=shape.windows, unread=unread)


def use_by_default(model: PreTrainedModel, scheme: KvScheme, calibrated: Calibrated | None) -> None:
    """Have `generate` make such a cache where it is given none."""
    make_cache(model, scheme, calibrated)  # says what is wrong now rather than then
    _hand_out(model, partial(make_cache, model, scheme, calibrated))
    vars(model)["kv_scheme"], vars(model)["kv_calibrated"] = scheme, calibrated


@contextmanager
def generating_with(model: PreTrainedModel, new_cache: Callable[[], Cache], *, chunk: int) -> Iterator[None]:
    """Have `generate` make this cache, and not the model's own, where it is given none, and read prompts so many tokens
    at a time."""
    own, config = vars(model).get(_PREPARE), model.generation_config
    assert config is not None
    at_once = config.prefill_chunk_size
    _hand_out(model, new_cache)
    config.prefill_chunk_size = chunk
    try:
        yield
    finally:
        config.prefill_chunk_size = at_once
        del vars(model)[_PREPARE]
        if own is not None:
            vars(model)[_PREPARE] = own


_PREPARE = "_prepare_cache_for_generation"


def _hand_out(model: PreTrainedModel, new_cache: Callable[[], Cache]) -> None:
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    prepare: Any = getattr(model, _PREPARE)

    def prepare_ours(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if wanted and model_kwargs.get(name) is None:
            model_kwargs[name] = new_cache()
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    vars(model)[_PREPARE] = prepare_ours


def fingerprint(embeddings: Tensor) -> str:
    """Of a model, by its embeddings (vocabulary, width), which compression leaves alone."""
    flat = embeddings.detach().flatten()
    some = flat[torch.linspace(0, flat.numel() - 1, 256, device=flat.device, dtype=torch.float64).long()]
    told = some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(told + str(tuple(embeddings.shape)).encode()).hexdigest()[:16]


def _embeddings(model: PreTrainedModel) -> Tensor:
    weight: Any = model.get_input_embeddings().weight
    return weight  # type: ignore[no-any-return]


def _listen(model: PreTrainedModel) -> None:
    """Have caches of ours told of each forward pass, once for all."""
    decoder: nn.Module = model.get_decoder()
    if not getattr(decoder, "laconic_tells_places", False):
        decoder.register_forward_pre_hook(_tell, with_kwargs=True)
        vars(decoder)["laconic_tells_places"] = True


def _tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = (kwargs.get("cache"), kwargs.get("past_key_values"))
    cache = next((c for c in given if isinstance(c, KvCache)), None)
    if cache is not None:
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        cache.places.begin(cache.get_seq_length(), tokens.shape[1], positions, mask)
