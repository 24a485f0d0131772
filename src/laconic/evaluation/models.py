"""The model to evaluate and its original, opened on one device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.evaluation.bootstrap import SEED
from laconic.evaluation.options import DomainOptions, TextOptions
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load


@dataclass(frozen=True)
class ModelPair:
    """A model and, if there is one, its original.

    Attributes:
        folder: Folder of the model.
        tokenizer: Tokenizer of the model.
        model: The model to evaluate.
        baseline: Its original.
        length: Tokens per window that both models can read.
        device: The device of both.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    baseline: PreTrainedModel | None
    length: int
    device: str


def open_pair(model: str | Path, options: TextOptions | DomainOptions) -> ModelPair:
    """Open a model and its original.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: The original, context length, device and dtype, and whether code and pickles of the model are trusted.

    Returns:
        Both models; windows have `options.context_length` tokens, or the model's context up to 2048.

    Raises:
        ValueError: The context length is below 2 or beyond the model's context, the original has another vocabulary, or
            a model cannot be opened.
    """
    folder = model_folder(str(model), trust=options.trust)
    tokenizer = load_tokenizer(folder, trust=options.trust)
    device, dtype = device_named(options.device), dtype_named(options.dtype)
    opened = load(folder, device=device, dtype=dtype, trust=options.trust)
    limit = getattr(opened.config.get_text_config(), "max_position_embeddings", None) or 2048
    # Some models of any length have -1 there (XLNet).
    limit = limit if limit > 0 else 2048
    length = min(2048, limit) if options.context_length is None else options.context_length
    if not 2 <= length <= limit:
        raise ValueError(f"--context-length {length} is not between 2 and the model's context of {limit}")
    baseline = None
    if options.baseline:
        baseline = load(options.baseline, device=device, dtype=dtype, trust=options.trust)
    vocabularies = {m.config.get_text_config().vocab_size for m in (opened, baseline) if m is not None}
    if len(vocabularies) > 1:
        raise ValueError(
            f"baseline {options.baseline} has another vocabulary than {model}; name the original of this artifact"
        )
    return ModelPair(folder, tokenizer, opened, baseline, length, device)


def describe_run(pair: ModelPair, start: float) -> dict[str, Any]:
    """Return the keys of a result that describe the run: time, device, seed, command and versions.

    Args:
        pair: The models.
        start: Start of the run by the monotonic clock, in seconds.
    """
    return {
        "seconds": round(time.monotonic() - start, 2),
        "device": pair.device,
        "seed": SEED,
        "command": command_line(),
        "versions": versions(),
    }


def device_named(name: str) -> str:
    """Return `cuda` or `cpu` for `auto`, and any other name unchanged.

    Args:
        name: `auto`, or the name of a torch device.
    """
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of this name, None for None.

    Args:
        name: Name of a dtype in torch, such as `bfloat16`.
    """
    return None if name is None else getattr(torch, name)


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`, such as `bfloat16`.

    Args:
        dtype: The dtype.
    """
    return str(dtype).removeprefix("torch.")
