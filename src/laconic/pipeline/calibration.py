"""Token ids of the texts of a recipe, and where it is worked."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from laconic.checkpoint.source import Source, check_tokens, load_tokenizer
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.data.text import calibration_windows, read_documents
from laconic.recipe import Calibration, Recipe
from laconic.stages.pruning import Protect, PruningStage
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings

# Tokens run through a block at once when the recipe does not say: enough to keep the arithmetic busy, and on a CPU
# few enough that intermediate results stay small: more would be slower there as well as larger.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


def calibration_ids(recipe: Recipe, source: Source, reason: str, *, trust: Trust = UNTRUSTED) -> Tensor:
    """Read the calibration set.

    Args:
        recipe: names it.
        source: the model, whose tokenizer is used.
        reason: what needs calibration text, for the message.
        trust: what the files of the model may do.

    Returns:
        Token ids, (samples, tokens).

    Raises:
        ValueError: if the recipe names no text, or none that goes with the model.
    """
    if recipe.calibration is None:
        raise ValueError(
            f"{reason} needs calibration text: add 'calibration: {{dataset: FILE_OR_HUB_NAME}}' to the recipe"
        )
    return _read_windows(source, recipe.calibration, "calibration", recipe.seed, trust)


def domain_ids(recipe: Recipe, source: Source, plan: Plan, trust: Trust) -> dict[int, Tensor]:
    """Read the texts on which stages choose the attention heads that they protect.

    Args:
        recipe: its seed is used.
        source: the original checkpoint, whose tokenizer is used.
        plan: of the walk.
        trust: what the files of the model may do.

    Returns:
        Token ids (samples, tokens), by the stage's number in the walk.

    Raises:
        ValueError: if a text cannot be read, or does not go with the model.
    """
    texts = {i: s.protect for i, s in enumerate(plan.stages) if isinstance(s, PruningStage) and s.protect}
    keys = {i: f"stages.{plan.first + i}.protect" for i in texts}
    return {i: _read_windows(source, text, keys[i], recipe.seed, trust) for i, text in texts.items()}


def device_of(recipe: Recipe) -> torch.device:
    """Return the device on which a recipe runs.

    Args:
        recipe: the recipe; `auto` is a GPU where torch finds one.

    Raises:
        ValueError: if the recipe asks for a GPU, and torch finds none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU; use device: auto or cpu")
    return torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")


def walk_settings(recipe: Recipe, windows: Tensor | None) -> Settings:
    """Return where a walk computes, how many samples at once, and in how much memory.

    Args:
        recipe: the recipe.
        windows: calibration token ids (samples, tokens); None where no stage needs any.

    Raises:
        ValueError: as `device_of`.
    """
    device = device_of(recipe)
    calibration = recipe.calibration or Calibration(dataset="")
    length = windows.shape[1] if windows is not None else calibration.max_seq_length
    batch = calibration.batch_size or max(1, _TOKENS_AT_ONCE[device.type] // length)
    gigabytes = calibration.max_memory_gb
    budget = gigabytes * 1e9 if gigabytes else psutil.virtual_memory().available / 4
    return Settings(device, batch, budget, calibration.moe_calibrate_all_experts)


def _read_windows(source: Source, text: Calibration | Protect, key: str, seed: int, trust: Trust) -> Tensor:
    """Read the token ids (samples, tokens) of a text. key: of the recipe, for messages."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and text.max_seq_length > limit:
        raise ValueError(
            f"{key}.max_seq_length {text.max_seq_length} is longer than the model's context of {limit}; lower it"
        )
    tokenizer = load_tokenizer(source.folder, trust=trust)
    documents = read_documents(text.dataset, split=text.split, config=text.config)
    windows = calibration_windows(
        documents, tokenizer, samples=text.num_calibration_samples, length=text.max_seq_length, seed=seed
    )
    check_tokens(int(windows.max()), source.config.get_text_config().vocab_size, source.folder)
    return windows
