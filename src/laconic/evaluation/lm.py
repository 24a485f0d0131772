"""lm-eval's interface to an open model. Importing this module imports lm-eval, so import it only to measure tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.evaluation.fidelity import not_finite
from laconic.evaluation.longbench import is_longbench
from laconic.structure.hooks import forward_hooks


class OpenedLM(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model around an open model.

    Prompts that do not fit the context lose their beginning, as in lm-eval, and are counted. Prompts of LongBench lose
    their middle, as in its paper (arXiv 2308.14508), because the question can be at either end. A task whose answers
    leave no room for a prompt is refused, and the other tasks go on. Logits that are NaN or infinite end the run;
    lm-eval would pick an answer.

    Attributes:
        cut: By task, the number of documents with a truncated prompt.
        refused: By task, the reason why it cannot be measured; its requests get empty answers.
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
            # In 16 bit, two answers often have exactly the same likelihood, and the first one would win.
            softmax_dtype=torch.float32,
        )
        self.cut: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        # The running requests; empty for windows of a rolling likelihood, which always fit.
        self._requests: Sequence[Any] = ()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._requests = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._requests = ()

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **settings: Any) -> Any:
        if not self._requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **settings)
        answers = [len(answer) for _, _, answer in requests]
        # The last token is only predicted, never read.
        needed = [len(context) + n - 1 for (_, context, _), n in zip(requests, answers, strict=True)]
        accepted = self._accept(self._requests, answers, needed, min_prompt=0)
        runnable = [r for r, ok in zip(requests, accepted, strict=True) if ok]
        run = super()._loglikelihood_tokens
        scores = iter(run(runnable, disable_tqdm=disable_tqdm, **settings) if runnable else ())
        return [next(scores) if ok else (0.0, False) for ok in accepted]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        answers = [normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests]
        needed = [len(self.tok_encode(r.args[0])) + n for r, n in zip(requests, answers, strict=True)]
        accepted = self._accept(requests, answers, needed, min_prompt=1)
        triples = zip(requests, answers, accepted, strict=True)
        runnable = [self._cut_middle(r, self.max_length - n) for r, n, ok in triples if ok]
        texts = iter(super().generate_until(runnable, disable_tqdm=disable_tqdm) if runnable else ())
        return [next(texts) if ok else "" for ok in accepted]

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with forward_hooks([(self.model, _check_finite)]):
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with forward_hooks([(self.model, _check_finite)]):
            return super()._model_generate(*args, **kwargs)

    def _cut_middle(self, request: Any, max_tokens: int) -> Any:
        """Cut the middle of a prompt of LongBench to at most `max_tokens`; return other requests unchanged."""
        if not is_longbench(request.task_name):
            return request
        ids = self.tok_encode(request.args[0])
        if len(ids) <= max_tokens:
            return request
        length = max_tokens
        while length >= 2:
            half = length // 2
            text = self.tok_decode(ids[:half]) + self.tok_decode(ids[-half:])
            # The joined text can have a few more tokens than its halves.
            if (excess := len(self.tok_encode(text)) - max_tokens) <= 0:
                return replace(request, arguments=(text, *request.args[1:]))
            length -= excess
        return request

    def _accept(
        self, requests: Sequence[Any], answers: Sequence[int], needed: Sequence[int], *, min_prompt: int
    ) -> list[bool]:
        """Refuse tasks whose answers do not fit, and count the prompts of the others that are truncated.

        Args:
            requests: lm-eval's requests.
            answers: Tokens of the answer of each request.
            needed: Tokens of the prompt and answer of each request.
            min_prompt: Tokens of a prompt that have to fit beside an answer.

        Returns:
            For each request, whether its task can be measured.
        """
        longest: dict[str, int] = {}
        for request, n in zip(requests, answers, strict=True):
            longest[request.task_name] = max(n, longest.get(request.task_name, 0))
        for task, n in longest.items():
            if n + min_prompt > self.max_length:
                self.refused[task] = (
                    f"the task '{task}' has answers of up to {n} tokens, which leave no room for a prompt in a context "
                    f"of {self.max_length}; raise --context-length if the model has more, or leave the task out"
                )
        accepted = [request.task_name not in self.refused for request in requests]
        triples = zip(requests, needed, accepted, strict=True)
        truncated = {(r.task_name, r.doc_id) for r, n, ok in triples if ok and n > self.max_length}
        self.cut.update(task for task, _ in truncated)
        return accepted


def _check_finite(model: PreTrainedModel, _: Any, output: Any) -> None:
    if not output.logits.amax().isfinite():
        raise ValueError(not_finite(model))
