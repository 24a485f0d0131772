"""A model of ours as lm-eval sees it. Imports lm-eval, so import it only when tasks are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class OpenedLM(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model around one that is open already, which refuses where lm-eval would go on: prompts
    that do not fit the context (it cuts their beginning) and logits that are no numbers (it picks an answer)."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context_length: int, batch_size: int
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=context_length,
            batch_size=batch_size,
            # In 16 bit two answers are often exactly as likely, and the first of them wins.
            softmax_dtype=torch.float32,
        )
        # Of the requests being run; windows of a rolling likelihood have none, but they fit.
        self._names: Sequence[str] = ()
        model.register_forward_hook(_check_finite)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._names = [r.task_name for r in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **how: Any) -> Any:
        # The last token is only predicted, never read.
        self._check_fit([len(context) + len(continuation) - 1 for _, context, continuation in requests])
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **how)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._names = [r.task_name for r in requests]
        room = [normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests]
        self._check_fit([len(self.tok_encode(r.args[0])) + n for r, n in zip(requests, room, strict=True)])
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _check_fit(self, lengths: Sequence[int]) -> None:
        worst = max(range(len(lengths)), key=lambda i: lengths[i])
        if lengths[worst] > self.max_length:
            raise ValueError(
                f"the task '{self._names[worst]}' needs {lengths[worst]} tokens, more than the context of "
                f"{self.max_length}; lower --fewshot, raise --context-length if the model has more, or leave it out"
            )


def _check_finite(model: PreTrainedModel, _: Any, output: Any) -> None:
    if not output.logits.amax().isfinite():
        raise ValueError(f"the model puts out NaN or infinity in {model.dtype}; compute in another dtype (float32)")
