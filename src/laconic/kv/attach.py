"""Quantized caches for a model: their construction, their use by `generate`, and the positions of their tokens."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from laconic.kv.attention_interface import read_packed
from laconic.kv.cache import KvCache, StaticByLayer
from laconic.kv.positions import TokenPositions
from laconic.kv.rotary import rotary_of
from laconic.kv.scheme import KvScheme
from laconic.kv.shape import kv_shape
from laconic.structure.anatomy import decoder_of
from laconic.structure.hooks import install_forward_pre_hook

_PREPARE = "_prepare_cache_for_generation"
"""Method of transformers' models in which `generate` makes its cache."""


def make_cache(model: PreTrainedModel, scheme: KvScheme, static: StaticByLayer | None = None) -> KvCache:
    """Make a new, empty cache for one batch: `model.generate(..., past_key_values=cache)`.

    Args:
        model: Model that will use the cache.
        scheme: Scheme of the cache.
        static: Static parameters from calibration, where the scheme needs them.

    Returns:
        The cache; a hook on the model's decoder gives it positions and padding in each forward pass.

    Raises:
        ValueError: The model cannot have such a cache, or the scheme was calibrated on another model.
    """
    shape = kv_shape(model.config)
    scheme.check(shape.layers, shape.heads, shape.channels)
    if scheme.calibrated and static is None:
        raise ValueError(f"a cache of '{scheme.method}' is calibrated; make it by 'laconic compress' and open that")
    if scheme.fingerprint and scheme.fingerprint != fingerprint(_embeddings(model)):
        raise ValueError("this cache was calibrated on another model; calibrate it on this one, by 'laconic compress'")
    decoder = decoder_of(model)
    if model.base_model is not decoder:
        # A model with towers gives its text part a mask for each type of layer; its own mask shows the padding.
        install_forward_pre_hook(model, _note_mask, with_kwargs=True)
    install_forward_pre_hook(decoder, _begin_pass, with_kwargs=True)
    positions = TokenPositions(rotary_of(model) if scheme.pre_rope else None)
    return KvCache(scheme, positions=positions, static=static, windows=shape.windows, lazy=read_packed(model))


def use_by_default(model: PreTrainedModel, scheme: KvScheme, static: StaticByLayer | None) -> None:
    """Make `generate` use such a cache if it gets no other.

    Args:
        model: Model whose `generate` is changed.
        scheme: Scheme of the cache.
        static: Static parameters from calibration, where the scheme needs them.

    Raises:
        ValueError: The model cannot have such a cache.
    """
    make_cache(model, scheme, static)  # raises errors now rather than in `generate`
    _make_in_generate(model, partial(make_cache, model, scheme, static))
    vars(model)["kv_scheme"], vars(model)["kv_static"] = scheme, static


@contextmanager
def generating_with(model: PreTrainedModel, new_cache: Callable[[], Cache], *, chunk: int) -> Iterator[None]:
    """Make `generate` use a cache if it gets no other, and read prompts in chunks, while the context lasts.

    Args:
        model: Model whose `generate` is changed.
        new_cache: Makes the cache of one call.
        chunk: Tokens of a chunk.
    """
    prepare, config = vars(model).get(_PREPARE), model.generation_config
    assert config is not None
    chunk_before = config.prefill_chunk_size
    _make_in_generate(model, new_cache)
    config.prefill_chunk_size = chunk
    try:
        yield
    finally:
        config.prefill_chunk_size = chunk_before
        del vars(model)[_PREPARE]
        if prepare is not None:
            vars(model)[_PREPARE] = prepare


def _make_in_generate(model: PreTrainedModel, new_cache: Callable[[], Cache]) -> None:
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    prepare: Any = getattr(model, _PREPARE)

    def prepare_with_ours(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if wanted and model_kwargs.get(name) is None:
            model_kwargs[name] = new_cache()
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    vars(model)[_PREPARE] = prepare_with_ours


def fingerprint(embeddings: Tensor) -> str:
    """Identify a model by its embeddings, which compression leaves unchanged.

    Args:
        embeddings: (vocabulary, width), any float dtype.

    Returns:
        16 hexadecimal digits: a hash of the shape and of 256 evenly spaced values in bfloat16.
    """
    flat = embeddings.detach().flatten()
    sample = flat[torch.linspace(0, flat.numel() - 1, 256, device=flat.device, dtype=torch.float64).long()]
    content = sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(content + str(tuple(embeddings.shape)).encode()).hexdigest()[:16]


def _embeddings(model: PreTrainedModel) -> Tensor:
    weight: Any = model.get_input_embeddings().weight
    return weight  # type: ignore[no-any-return]


def _note_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the cache of a forward pass, if it is quantized, the mask of the whole model."""
    if (cache := _cache_of(kwargs)) is not None:
        cache.mask = kwargs.get("attention_mask")


def _cache_of(kwargs: dict[str, Any]) -> KvCache | None:
    caches = (kwargs.get("cache"), kwargs.get("past_key_values"))
    return next((c for c in caches if isinstance(c, KvCache)), None)


def _begin_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the cache of a forward pass, if it is quantized, the positions and the padding of the new tokens."""
    if (cache := _cache_of(kwargs)) is not None:
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if isinstance(mask, dict):
            mask = cache.mask
        cached, new = cache.get_seq_length(), tokens.shape[1]
        # Without padding, `generate` says by positions that a prompt begins anew; a single new token is none.
        anew = mask is None and positions is not None and new > 1 and cached > 0 and int(positions.max()) < cached
        if anew or new == 0 or (mask is not None and mask.dim() == 2 and mask.shape[1] < cached + new):
            raise ValueError(
                f"the cache holds {cached} tokens of an earlier batch and is given a shorter one; call cache.reset() "
                "before another batch"
            )
        cache.positions.begin_pass(cached, new, positions, mask)
