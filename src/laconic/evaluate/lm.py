"""A model of ours as lm-eval sees it. Imports lm-eval, so import it only when tasks are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.evaluate.longbench import is_longbench
from laconic.structure.hooks import forward_hooks


class OpenedLM(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model around one that is open already. A prompt that does not fit the context loses its
    beginning, as there; one of LongBench loses its middle, as its authors have it (arXiv 2308.14508), since what is
    asked stands at both ends. Otherwise than there such prompts are counted; a task whose answers leave no room for a
    prompt is refused by itself, and does not end the run; logits that are no numbers do end it, where lm-eval picks an
    answer.

    cut: by task, documents of which a prompt was cut. refused: by task, why it could not be measured; its
    requests get answers that mean nothing.
    """

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
        self.cut: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        # Requests being run; windows of a rolling likelihood are of none, but they fit.
        self._asked: Sequence[Any] = ()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._asked = ()

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **how: Any) -> Any:
        if not self._asked:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **how)
        answers = [len(answer) for _, _, answer in requests]
        # The last token is only predicted, never read.
        needed = [len(context) + n - 1 for (_, context, _), n in zip(requests, answers, strict=True)]
        measured = self._measured(self._asked, answers, needed, least=0)
        left = [r for r, kept in zip(requests, measured, strict=True) if kept]
        said = iter(super()._loglikelihood_tokens(left, disable_tqdm=disable_tqdm, **how) if left else ())
        return [next(said) if kept else (0.0, False) for kept in measured]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        answers = [normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests]
        needed = [len(self.tok_encode(r.args[0])) + n for r, n in zip(requests, answers, strict=True)]
        measured = self._measured(requests, answers, needed, least=1)
        found = zip(requests, answers, measured, strict=True)
        left = [self._without_middle(r, self.max_length - n) for r, n, kept in found if kept]
        said = iter(super().generate_until(left, disable_tqdm=disable_tqdm) if left else ())
        return [next(said) if kept else "" for kept in measured]

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with forward_hooks([(self.model, _check_finite)]):
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with forward_hooks([(self.model, _check_finite)]):
            return super()._model_generate(*args, **kwargs)

    def _without_middle(self, request: Any, room: int) -> Any:
        """A request of LongBench with a prompt of at most so many tokens; any other as it is."""
        if not is_longbench(request.task_name):
            return request
        ids = self.tok_encode(request.args[0])
        if len(ids) <= room:
            return request
        kept = room
        while kept >= 2:
            half = kept // 2
            text = self.tok_decode(ids[:half]) + self.tok_decode(ids[-half:])
            # Where the halves meet, the text may be of a few tokens more.
            if (over := len(self.tok_encode(text)) - room) <= 0:
                return replace(request, arguments=(text, *request.args[1:]))
            kept -= over
        return request

    def _measured(
        self, requests: Sequence[Any], answers: Sequence[int], needed: Sequence[int], *, least: int
    ) -> list[bool]:
        """Which requests are of tasks that can be measured; those that are cut are counted. answers: tokens of each
        request's; needed: with its prompt. least: tokens that have to be there beside an answer."""
        longest: dict[str, int] = {}
        for request, n in zip(requests, answers, strict=True):
            longest[request.task_name] = max(n, longest.get(request.task_name, 0))
        for task, n in longest.items():
            if n + least > self.max_length:
                self.refused[task] = (
                    f"the task '{task}' has answers of up to {n} tokens, which leave no room for a prompt in a context "
                    f"of {self.max_length}; raise --context-length if the model has more, or leave the task out"
                )
        measured = [request.task_name not in self.refused for request in requests]
        found = zip(requests, needed, measured, strict=True)
        long = {(r.task_name, r.doc_id) for r, n, kept in found if kept and n > self.max_length}
        self.cut.update(task for task, _ in long)
        return measured


def _check_finite(model: PreTrainedModel, _: Any, output: Any) -> None:
    if not output.logits.amax().isfinite():
        raise ValueError(f"the model puts out NaN or infinity in {model.dtype}; compute in another dtype (float32)")
