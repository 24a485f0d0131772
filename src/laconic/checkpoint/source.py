"""Opening a model by folder or Hub name: its configuration, its checkpoint, and a skeleton without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from laconic.checkpoint.files import (
    ADAPTER_CONFIG,
    DTYPES,
    KV_CONFIG,
    SMALL_FILES,
    Checkpoint,
    first_line,
    open_checkpoint,
    read_json,
)
from laconic.checkpoint.layout import arrange, unwrap_conv1d
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.structure.experts import unstack_experts


@dataclass(frozen=True)
class Source:
    """A model to compress.

    Attributes:
        name: Folder or Hub name, as the user gave it.
        folder: Local folder.
        raw: Contents of config.json (`read_config`).
        config: Configuration, as transformers reads it.
        checkpoint: Its tensors.
        dtype: The dtype of most of its weights.
        quantized: What was quantized in its files, in words; empty if nothing was. Its checkpoint decodes it.
    """

    name: str
    folder: Path
    raw: Mapping[str, Any]
    config: PretrainedConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    quantized: str = ""


def open_source(name: str, *, trust: Trust = UNTRUSTED, quantized: bool = False) -> Source:
    """Open a model to compress.

    Args:
        name: A local folder, or a Hub name (downloaded, or taken from the cache when offline).
        trust: Permissions of the model's files.
        quantized: Whether its weights and its cache may be quantized; `runtime.inputs` decodes the weights.

    Returns:
        The model's folder, config and checkpoint; no weights are loaded.

    Raises:
        ValueError: It is not a 16- or 32-bit model that can be opened safely.
    """
    folder = model_folder(name, trust=trust)
    _check_no_adapter(folder)
    raw, config = read_config(folder, trust=trust)
    if (quantization := raw.get("quantization_config")) and not quantized:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{name} is already quantized ({method}); start from the original 16-bit model")
    if not quantized:
        check_uncalibrated(name, raw)
    checkpoint = open_checkpoint(folder, trust=trust)
    return Source(name, folder, raw, config, checkpoint, torch.bfloat16 if quantization else main_dtype(checkpoint))


def check_uncalibrated(name: str, raw: Mapping[str, Any]) -> None:
    """Check that a model has no quantized cache, whose calibration belongs to its weights, blocks and heads.

    Args:
        name: The model, for the message.
        raw: Contents of config.json.

    Raises:
        ValueError: The model has one.
    """
    if KV_CONFIG in raw:
        raise ValueError(
            f"{name} has a quantized cache ({KV_CONFIG} in config.json), which was calibrated for it as it is; start "
            "from the model that it was made from"
        )


def _check_no_adapter(folder: Path) -> None:
    """Check that a folder holds no adapter, which transformers would apply to the weights when it opens the folder."""
    if not (folder / ADAPTER_CONFIG).is_file() or not any(folder.glob("adapter_model.*")):
        return
    if not (folder / "config.json").exists():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds an adapter of '{base}' and no model; merge them with peft "
            "(PeftModel.from_pretrained(model, folder).merge_and_unload()), save the result, and compress that"
        )
    raise ValueError(
        f"{folder} holds an adapter ({ADAPTER_CONFIG}) that transformers applies to its weights; move the adapter's "
        "files to another folder, and merge them with peft (PeftModel.from_pretrained(model, "
        "folder).merge_and_unload()) or compress without them"
    )


def read_config(folder: Path, *, trust: Trust = UNTRUSTED) -> tuple[dict[str, Any], PretrainedConfig]:
    """Read config.json, as a dict and as transformers' config.

    Args:
        folder: The model folder.
        trust: Permissions of the model's files.

    Returns:
        Contents of config.json, and the config that transformers makes of them. In both, `tie_word_embeddings` is false
        if the checkpoint has a head of its own.

    Raises:
        ValueError: It does not describe a model, or the model has Python code that may not be run.
    """
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{folder}/config.json holds no keys and values; download it again")
    if "auto_map" in raw and not trust.remote_code:
        raise ValueError(f"{folder} wants to run its own code (auto_map); pass --trust-remote-code if you trust it")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    except Exception as e:
        raise ValueError(f"{folder}/config.json does not describe a model transformers knows: {first_line(e)}") from e
    if _is_tied(config) and _has_own_head(config, folder, trust):
        raw = {**raw, "tie_word_embeddings": False}
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return raw, config


def _is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _has_own_head(config: PretrainedConfig, folder: Path, trust: Trust) -> bool:
    """Return whether the head's weight differs from the embeddings, although the config says that they are tied.

    transformers believes the weights then, and unties the two.
    """
    try:
        checkpoint = open_checkpoint(folder, trust=trust)
        rows = getattr(config.get_text_config(), "vocab_size", 0)
        if sum(len(s.shape) == 2 and s.shape[0] == rows for s in checkpoint.tensors.values()) < 2:
            return False
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = build_skeleton(config, torch.bfloat16, trust=trust)
    except ValueError:
        return False  # reported where the checkpoint or the model is needed
    checkpoint = arrange(checkpoint, model)
    for pair in model.all_tied_weights_keys.items():
        if all(name in checkpoint.tensors for name in pair):
            first, second = checkpoint.load(pair, finite=False).values()
            if first.shape != second.shape or not torch.equal(first, second.to(first.dtype)):
                return True
    return False


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, *, trust: Trust = UNTRUSTED) -> PreTrainedModel:
    """Build a model with parameters on the meta device (no memory) and real buffers (rotary tables).

    Every matrix has its own linear: experts are unstacked, and Conv1D modules replaced.

    Args:
        config: Configuration of the model.
        dtype: Dtype of the parameters.
        trust: Permissions of the model's files.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: transformers has no causal language model of this configuration, or its experts cannot be
            unstacked.
    """
    # Imported here, since accelerate may be absent where vLLM runs our plugin.
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    unsupported = f"unsupported architecture '{config.model_type}': it is no causal language model"
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = _auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trust.remote_code
            )
    except Exception as e:
        if "Unrecognized configuration class" in str(e):
            raise ValueError(unsupported) from e
        raise ValueError(f"config.json describes no {config.model_type} that can be built: {first_line(e)}") from e
    # transformers also builds encoders (BERT) as causal models; their attention is not causal.
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if causal and not any(causal):
        raise ValueError(unsupported)
    _keep_in_float32(model, dtype)
    unwrap_conv1d(model)
    unstack_experts(model)
    model.tie_weights()
    model.eval()
    return model


def auto_class_name(config: Mapping[str, Any]) -> str:
    """Return the name of the class by which transformers opens a model: with its towers, where it has any.

    Args:
        config: Contents of config.json.
    """
    model_type = str(config.get("model_type"))
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if multimodal is None or config.get("is_encoder_decoder"):
        return "AutoModelForCausalLM"
    # Some configs have a class for the text part alone too; the checkpoint says of which its tensors are.
    named = multimodal in (config.get("architectures") or ())
    text_alone = not named and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "AutoModelForCausalLM" if text_alone else "AutoModelForImageTextToText"


def _auto_class(config: PretrainedConfig) -> Any:
    keys = ("model_type", "architectures", "is_encoder_decoder")
    name = auto_class_name({key: getattr(config, key, None) for key in keys})
    return AutoModelForImageTextToText if name == "AutoModelForImageTextToText" else AutoModelForCausalLM


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters float32 that transformers loads in it whatever the dtype (biases of routers)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for name, parameter in list(model.named_parameters()):
        if pattern.search(name) and parameter.dtype != torch.float32:
            path, _, leaf = name.rpartition(".")
            wide = nn.Parameter(parameter.data.to(torch.float32), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(path), leaf, wide)


def arrange_source(source: Source, model: PreTrainedModel) -> Source:
    """Map the checkpoint of a source to the names and shapes of a skeleton's parameters.

    Args:
        source: The source, its checkpoint with the names of files.
        model: Its skeleton.

    Returns:
        The source with the arranged checkpoint (`layout.arrange`).
    """
    return replace(source, checkpoint=arrange(source.checkpoint, model))


def load_tokenizer(folder: Path, *, trust: Trust = UNTRUSTED) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Args:
        folder: The model folder.
        trust: Permissions of the model's files.

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is none, or it cannot be opened.
    """
    if not any(
        (folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder / 'config.json'} is missing; is {folder} a Hugging Face model folder?")
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json); copy the original model's tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
    except Exception as e:
        raise ValueError(f"the tokenizer in {folder} cannot be opened: {first_line(e)}") from e


def check_tokens(highest: int, known: int, folder: Path) -> None:
    """Check that the tokenizer's token ids are in the model's vocabulary.

    Args:
        highest: Highest token id that the tokenizer produced.
        known: Size of the model's vocabulary.
        folder: Folder of the tokenizer, for the message.

    Raises:
        ValueError: The highest id is outside the vocabulary.
    """
    if highest >= known:
        raise ValueError(
            f"the tokenizer in {folder} gives token {highest}, the model knows {known}; "
            "copy the original model's tokenizer files there"
        )


def model_folder(name: str, *, trust: Trust = UNTRUSTED) -> Path:
    """Find the folder of a model; a Hub repository is downloaded, or taken from the cache when offline.

    Args:
        name: A local folder, or a Hub name (owner/model).
        trust: Permissions of the model's files; pickle weights are downloaded only if they may be read.

    Returns:
        The local folder.

    Raises:
        ValueError: There is neither a folder nor a repository of this name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"no model folder '{name}'; give a folder with config.json, or a Hub name like owner/model")
    patterns = [*SMALL_FILES, "*.safetensors", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns + (["*.bin"] if trust.pickle else [])))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ValueError(f"'{name}' is no local folder and could not be fetched from the Hub; check the name") from e


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the 16- or 32-bit float dtype of most weights of a checkpoint.

    Args:
        checkpoint: The checkpoint.

    Raises:
        ValueError: No weight has one.
    """
    sizes: dict[str, int] = {}
    for stored in checkpoint.tensors.values():
        n = 1
        for s in stored.shape:
            n *= s
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + n
    floats = {name: size for name, size in sizes.items() if name in DTYPES}
    if not floats:
        held = f"weights in {', '.join(sorted(sizes))}" if sizes else "no weights"
        raise ValueError(f"{checkpoint.folder} holds {held}; Laconic reads bf16, fp16 or fp32 weights")
    return DTYPES[max(floats, key=lambda k: floats[k])]
