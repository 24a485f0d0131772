"""Pages of a packed cache in vLLM: their size, and whether a model can be served with them and these options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from laconic.checkpoint.files import KV_CONFIG
from laconic.kv.rotary import rotary_of
from laconic.kv.scheme import KvScheme, tokens_at_once
from laconic.kv.shape import KvShape
from laconic.serving.page import PagedLayer, RotaryTable

log = init_logger(__name__)

# Tokens of a page, unless --block-size says otherwise: of slots and nothing else, and with what tokens share.
PAGE_TOKENS_OF_SLOTS = 128
_PAGE_TOKENS = 512


def with_pages(layer: PagedLayer, config: VllmConfig) -> PagedLayer:
    """Return the layer with the tokens of a page, where a page has more than slots.

    Args:
        layer: The layer, without them.
        config: Config of the model that vLLM serves.

    Returns:
        The layer.

    Raises:
        ValueError: Pages are too small.
    """
    if not layer.sinks and not layer.lookback:
        return layer
    layer = replace(layer, page_tokens=_page_tokens(layer, config))
    if layer.residual_length and layer.row_bytes >= layer.exact_bytes:
        raise ValueError(
            f"pages of {layer.page_tokens} tokens keep {layer.recent} of them in 16 bit too, and take more memory than "
            f"a cache in 16 bit; serve with --block-size {_roomy_page(layer)}, or do without the recent tokens in 16 "
            """bit with --additional-config '{"laconic_kv": {"window": false}}'"""
        )
    return layer


def _page_tokens(layer: PagedLayer, config: VllmConfig) -> int:
    """Return the tokens of pages that have more than slots; the larger a page, the less that is."""
    cache = config.cache_config
    # vLLM chooses a size for CPUs before models are loaded, and for GPUs after.
    if cache.user_specified_block_size or current_platform.is_cpu():
        return int(cache.block_size)
    return _roomy_page(layer)


def _roomy_page(layer: PagedLayer) -> int:
    """Return the tokens of a page in which recent tokens in 16 bit take at most half as many bytes as slots."""
    tokens = _PAGE_TOKENS
    recent_bytes = (layer.residual_length + layer.unit) * layer.exact_bytes if layer.residual_length else 0
    while tokens * layer.slot_bytes < 2 * recent_bytes:
        tokens *= 2
    return tokens


def keeps_recent(config: VllmConfig) -> bool:
    """Return whether recent tokens are kept in 16 bit, as the scheme says, or `{"laconic_kv": {"window": false}}`.

    Args:
        config: Config of the model that vLLM serves.
    """
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    return bool(options.get("laconic_kv", {}).get("window", True))


def check_servable(scheme: KvScheme, config: VllmConfig, shape: KvShape) -> None:
    """Check that a model can be served with these options.

    Args:
        scheme: Scheme of its cache.
        config: Config of the model that vLLM serves.
        shape: Shape of its cache.

    Raises:
        ValueError: It cannot.
    """
    scheme.check(shape.layers, shape.heads, shape.channels)
    if config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"this artifact has a cache format of its own; leave out --kv-cache-dtype, or drop {KV_CONFIG}"
        )
    if config.parallel_config.tensor_parallel_size > 1:
        raise ValueError("a packed cache can be served on one device only; serve with --tensor-parallel-size 1")
    recent = scheme.residual_length and keeps_recent(config)
    if config.speculative_config is not None and (recent or any(tokens_at_once(layer) > 1 for layer in scheme.layers)):
        raise ValueError(
            "tokens of a draft replace recent tokens in 16 bit, and keys whose ranges are shared by tokens cannot be "
            "removed again; serve without speculative decoding"
        )
    if scheme.residual_length and not recent:
        log.warning(
            "laconic: served without the last %d tokens of a text in 16 bit; results measured with them do not hold "
            "here",
            scheme.residual_length,
        )


def rotary_tables(hf_config: Any, length: int) -> dict[str | None, RotaryTable]:
    """Return the model's rotary embedding of every position, by type of layer where it differs by type.

    Args:
        hf_config: Config of the model.
        length: Number of positions.

    Returns:
        Cosines and sines, of each type of layer; of the key None where there are no types.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    rotary = rotary_of(model)
    module_class: Any = type(rotary.module)
    module = module_class(hf_config.get_text_config())
    tables: dict[str | None, RotaryTable] = {}
    layer_types: set[str | None] = set(rotary.layer_types or (None,))
    for layer_type in layer_types:
        options = {} if layer_type is None else {"layer_type": layer_type}
        cos, sin = module(torch.empty(0, dtype=torch.float32), torch.arange(length)[None], **options)
        tables[layer_type] = (cos[0].float(), sin[0].float())
    return tables
