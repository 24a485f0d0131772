"""Open an artifact with laconic's own formats and linears, independent of engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from laconic.checkpoint.files import Checkpoint, linear_quantization_config, open_checkpoint
from laconic.checkpoint.layout import arrange, engine_names
from laconic.checkpoint.materialise import materialise
from laconic.checkpoint.source import build_skeleton, main_dtype, model_folder, read_config
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.kv.attach import use_by_default
from laconic.kv.files import read_kv_scheme
from laconic.runtime.adapters import adapter_folders, apply_adapter
from laconic.runtime.decoding import is_decodable
from laconic.runtime.embedding import replace_embedding
from laconic.runtime.inputs import decode_checkpoint
from laconic.runtime.linear import QLinear, replace_linear
from laconic.runtime.quant_config import is_readable, schemes_of
from laconic.structure.anatomy import find_embeddings, linears_of


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
    adapter: bool = True,
    decoded: bool = False,
    trust: Trust = UNTRUSTED,
) -> PreTrainedModel:
    """Open an artifact, another compressed-tensors checkpoint of a format that we have, or a plain model.

    If the artifact has a quantized key-value cache, `generate` uses it. An adapter that it keeps is applied.

    Args:
        name: Folder of the model, or its name on the Hub.
        device: Device of the model.
        dtype: Dtype to compute in. None: the dtype of the checkpoint.
        packed: Whether to keep only the codes and decode them in every forward pass, instead of decoding them once.
        adapter: Whether to apply the adapter that stands beside the weights (`keep_adapters`).
        decoded: Whether quantized weights are decoded into the plain modules of the model.
        trust: Permissions of the model's files.

    Returns:
        The model, as transformers has it, with a `QLinear` for each quantized linear, and a `QEmbedding` for
        quantized embeddings, which keeps its codes.

    Raises:
        ValueError: The folder cannot be read, the model needs more trust, or `dtype` is no floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype should be a floating-point dtype of torch, such as torch.bfloat16, not {dtype!r}")
    folder = model_folder(str(name), trust=trust)
    raw, config = read_config(folder, trust=trust)
    checkpoint, quantization = _open_quantized(folder, raw, config, decoded=decoded, trust=trust)
    dtype = dtype or main_dtype(checkpoint)
    model = build_skeleton(config, dtype, trust=trust)
    checkpoint = arrange(checkpoint, model)
    if quantization:
        _replace_quantized(model, checkpoint, quantization, dtype)
    materialise(model, "", checkpoint, torch.device(device))
    model.tie_weights()
    if not packed:
        for module in model.modules():
            if isinstance(module, QLinear):
                module.unpack()
    for adapter_folder in adapter_folders(folder) if adapter else ():
        apply_adapter(model, adapter_folder)
    if cache := read_kv_scheme(folder, raw):
        use_by_default(model, *cache)
    return model


def _open_quantized(
    folder: Path, raw: Mapping[str, Any], config: PretrainedConfig, *, decoded: bool, trust: Trust
) -> tuple[Checkpoint, Mapping[str, Any] | None]:
    """Open a checkpoint, and return with it the quantization_config of the linears whose codes are kept.

    What transformers would read of `config` is removed from it.
    """
    checkpoint = open_checkpoint(folder, trust=trust)
    quantization = linear_quantization_config(raw)
    if not quantization:
        return checkpoint, None
    if not is_readable(quantization) and not is_decodable(quantization):
        raise ValueError(
            f"{folder} is quantized by '{quantization.get('quant_method')}', which Laconic cannot read; open it "
            "with transformers or vLLM"
        )
    if decoded or is_decodable(quantization) or any(n.endswith(".weight_g_idx") for n in checkpoint.tensors):
        # The latter two are layouts that no linear of ours computes with.
        return decode_checkpoint(checkpoint, raw, config, trust), None
    del config.quantization_config
    return checkpoint, quantization


def _replace_quantized(
    model: PreTrainedModel, checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Replace the linears and embeddings whose codes are kept."""
    embeddings = [n for n in [find_embeddings(model)] if n]
    names = engine_names(checkpoint, model, [*linears_of(model), *embeddings])
    for part, scheme in schemes_of(quantization, names, embeddings).items():
        with torch.device("meta"):
            if part in embeddings:
                replace_embedding(model, part, scheme, dtype)
            else:
                replace_linear(model, part, scheme, dtype)


def load_dense(folder: Path, *, device: torch.device, dtype: torch.dtype, trust: Trust) -> PreTrainedModel:
    """Open the checkpoint that a stage changes: quantized weights decoded, a kept adapter left out.

    Args:
        folder: Folder of the checkpoint.
        device: Device of the model.
        dtype: Dtype of the model.
        trust: Permissions of the model's files.

    Returns:
        The model, with plain linears.

    Raises:
        ValueError: The folder cannot be read, or the model needs more trust.
    """
    return load(folder, device=device, dtype=dtype, adapter=False, decoded=True, trust=trust)
