"""What models write: greedy continuations of openings of a text, an artifact's beside its original's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Tokens of an opening at most, and of what is written to it.
OPENING, WRITTEN = 64, 64


def write_samples(
    ours: PreTrainedModel,
    theirs: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    number: int,
) -> list[dict[str, str]]:
    """Continuations by a model, and by its original, of openings of windows that lie evenly over the text.

    windows: (n, length) of token ids; an opening and what is written to it fit in one. number: of openings. Each sample
    has `prompt` and `written`, and `original` where there is an original. Raises: ValueError when there are fewer
    windows than openings asked for.
    """
    if number > len(windows):
        raise ValueError(f"--generate {number} is more than the {len(windows)} windows of the text; ask for fewer")
    length = windows.shape[1]
    most = min(WRITTEN, length // 2)
    asked = windows[torch.linspace(0, len(windows) - 1, number).long(), : min(OPENING, length - most)]
    models = {"written": ours} | ({"original": theirs} if theirs is not None else {})
    return [
        {"prompt": _words(tokenizer, prompt)}
        | {name: _words(tokenizer, continue_greedily(model, prompt, most)) for name, model in models.items()}
        for prompt in asked
    ]


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, prompt: Tensor, most: int) -> Tensor:
    """The likeliest token each time, up to the end of the text or `most` tokens. prompt: (tokens,). Returns: the new
    ones. It goes through the cache that the model generates with, so a quantized one shows.

    Nothing of a checkpoint's own generation settings counts but where a text ends: a penalty on what was written before
    would hide that a model repeats itself.
    """
    own = model.generation_config
    end = own.eos_token_id if own is not None else None
    first = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0 if first is None else first)
    ids = prompt[None].to(model.device)
    try:
        made: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most
        )
    finally:
        model.generation_config = own
    return torch.as_tensor(made)[0, len(prompt) :].cpu()


def _words(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
