"""Greedy continuations of openings of a text, by a model and by its original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from laconic.evaluation.models import ModelPair

# Largest number of tokens of an opening, and of its continuation.
OPENING_TOKENS, NEW_TOKENS = 64, 64


def write_samples(pair: ModelPair, windows: Tensor, count: int) -> list[dict[str, str]]:
    """Continue openings of windows that are spread evenly over the text, by a model and by its original.

    Args:
        pair: The models.
        windows: (n, length) token ids; an opening and its continuation fit in one window.
        count: Number of openings.

    Returns:
        For each opening `prompt`, `written`, and `original` if there is an original.

    Raises:
        ValueError: There are fewer windows than openings.
    """
    if count > len(windows):
        raise ValueError(f"--generate {count} is more than the {len(windows)} windows of the text; ask for fewer")
    length = windows.shape[1]
    new_tokens = min(NEW_TOKENS, length // 2)
    positions = torch.linspace(0, len(windows) - 1, count).long()
    prompts = windows[positions, : min(OPENING_TOKENS, length - new_tokens)]
    models = {"written": pair.model} | ({"original": pair.baseline} if pair.baseline is not None else {})
    return [
        {"prompt": _decode(pair.tokenizer, prompt)}
        | {key: _decode(pair.tokenizer, continue_greedily(m, prompt, new_tokens)) for key, m in models.items()}
        for prompt in prompts
    ]


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """Generate the likeliest tokens up to the end of the text, through the cache with which the model generates.

    Of the checkpoint's generation settings only the end-of-text tokens apply: a repetition penalty would hide that a
    model repeats itself.

    Args:
        model: The model.
        prompt: (tokens,) token ids.
        max_new_tokens: Largest number of new tokens.

    Returns:
        (new tokens,) token ids on the CPU.
    """
    settings = model.generation_config
    end = settings.eos_token_id if settings is not None else None
    first_end = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0 if first_end is None else first_end)
    ids = prompt[None].to(model.device)
    try:
        generated: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
    finally:
        model.generation_config = settings
    return torch.as_tensor(generated)[0, len(prompt) :].cpu()


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
