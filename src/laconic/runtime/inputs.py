"""Models that are already quantized, opened as 16-bit checkpoints whose matrices are decoded when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from laconic.checkpoint.files import DTYPES, Checkpoint
from laconic.checkpoint.layout import TransposedLinear, arrange
from laconic.checkpoint.source import Source, build_skeleton, check_uncalibrated, main_dtype, open_source
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.runtime.compressed import CACHE_SCALES, compressed_matrices
from laconic.runtime.decoding import AWQ, GPTQ, decode_foreign, is_decodable, with_matrices
from laconic.runtime.quant_config import is_readable

# Names of 16-bit dtypes in config.json and in safetensors.
_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


def open_input(name: str, *, trust: Trust = UNTRUSTED, cached: bool = False) -> Source:
    """Open a model to compress; a quantized one is read as a 16-bit checkpoint.

    Args:
        name: A local folder, or a Hub name.
        trust: Permissions of the model's files.
        cached: Whether it may have a quantized cache.

    Returns:
        The model. Nothing tells of its quantization but `Source.quantized`.

    Raises:
        ValueError: The model cannot be opened safely, or its quantization is not read.
    """
    source = open_source(name, trust=trust, quantized=True)
    if not cached:
        check_uncalibrated(name, source.raw)
    quantization = source.raw.get("quantization_config")
    if not quantization:
        return source
    checkpoint = decode_checkpoint(source.checkpoint, source.raw, source.config, trust)
    count = sum(stored.decoding is not None for stored in checkpoint.tensors.values())
    raw = {key: value for key, value in source.raw.items() if key != "quantization_config"}
    return replace(
        source,
        raw=raw,
        checkpoint=checkpoint,
        dtype=main_dtype(checkpoint),
        quantized=f"{count} matrices in {quantization['quant_method']}",
    )


def decode_checkpoint(
    checkpoint: Checkpoint, raw: Mapping[str, Any], config: PretrainedConfig, trust: Trust
) -> Checkpoint:
    """Return a quantized checkpoint as a 16-bit one.

    Args:
        checkpoint: The checkpoint, with the names of its files.
        raw: Contents of its config.json.
        config: The config that transformers makes of them; its quantization is deleted.
        trust: Permissions of the model's files.

    Returns:
        A checkpoint in which each quantized matrix is a tensor that is decoded when it is loaded.

    Raises:
        ValueError: The quantization is not read.
    """
    quantization = raw["quantization_config"]
    if not isinstance(quantization, Mapping) or not (is_decodable(quantization) or is_readable(quantization)):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(f"{checkpoint.folder} is already quantized ({method}); start from the original 16-bit model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = _dtype(raw, checkpoint)
    # A quantized cache belongs to engines: it is no part of the weights.
    tensors = {n: s for n, s in checkpoint.tensors.items() if n.rpartition(".")[2] not in CACHE_SCALES}
    checkpoint = replace(checkpoint, tensors=tensors)
    if is_decodable(quantization):
        packed = quantization["quant_method"] in (GPTQ, AWQ)
        transposed = _transposed(checkpoint, config, trust) if packed else ()
        return decode_foreign(checkpoint, quantization, dtype, transposed)
    weights = {key: value for key, value in quantization.items() if key != "kv_cache_scheme"}
    return with_matrices(checkpoint, compressed_matrices(checkpoint, weights, config, trust), dtype)


def _transposed(checkpoint: Checkpoint, config: PretrainedConfig, trust: Trust) -> set[str]:
    """Return the names in files of linears whose weight a 16-bit checkpoint has as (in, out)."""
    try:
        model = build_skeleton(config, torch.bfloat16, trust=trust)
    except ValueError:
        return set()  # reported where the model is needed
    paths = arrange(checkpoint, model).paths
    return {paths.get(name, name) for name, m in model.named_modules() if isinstance(m, TransposedLinear)}


def _dtype(raw: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Return the dtype of decoded matrices: that of config.json if it has 16 bits, else that of most other tensors."""
    for part in (raw, raw.get("text_config") or {}):
        if (name := part.get("dtype") or part.get("torch_dtype")) in _DTYPES:
            return _DTYPES[name]
    most = main_dtype(checkpoint)
    return next(name for name, dtype in DTYPES.items() if dtype == most)
