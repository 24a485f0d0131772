"""Scores of LongBench through each cache: lm-eval's tasks with the same prompts, so that differences are paired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.evaluation.harness import open_hub, quiet_lm_eval, require_lm_eval, run_tasks
from laconic.evaluation.options import LongBenchOptions
from laconic.evaluation.retention import compare_scores
from laconic.evaluation.task_files import OpenTasks, open_local
from laconic.evaluation.through_cache import PLAIN, Caches
from laconic.kv.attach import generating_with


def open_longbench(options: LongBenchOptions, context_length: int) -> OpenTasks:
    """Open tasks of LongBench.

    Args:
        options: The tasks and their documents.
        context_length: Tokens of a prompt and its answer.

    Returns:
        The tasks.

    Raises:
        ValueError: A task cannot be opened, or its answers do not fit the context.
    """
    require_lm_eval()
    with quiet_lm_eval():
        opened = open_local(options.tasks, Path(options.data), None) if options.data else open_hub(options.tasks)
        tasks = opened.manager.load(opened.tasks)["tasks"]
    for name, task in tasks.items():
        answer = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
        # A prompt without its middle has at least one token of either half.
        if answer + 2 > context_length:
            raise ValueError(
                f"answers of '{name}' take {answer} tokens, and the context has {context_length}; raise "
                "--context-length, or leave the task out"
            )
    return opened


def score_by_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Caches,
    opened: OpenTasks,
    *,
    context_length: int,
    chunk: int,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score tasks of LongBench through each cache.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        caches: The caches, `16 bit` among them, which is the baseline of the others.
        opened: The tasks.
        context_length: Tokens of a prompt and its answer; longer prompts lose their middle.
        chunk: Tokens per forward pass of a prompt, so that later tokens attend to what the cache stores.
        batch_size: Prompts per forward pass.
        limit: Number of documents of each task, from its first one. None: all.

    Returns:
        `rows`: by cache, the rows of `retention.compare_scores`; `cut`: by task, the number of truncated prompts;
        `task_versions`: lm-eval's versions of the tasks.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    from laconic.evaluation.lm import OpenedLM

    runs = {}
    lm = OpenedLM(model, tokenizer, context_length=context_length, batch_size=batch_size)
    for name, new_cache in caches.items():
        lm.cut.clear()
        lm.refused.clear()
        with quiet_lm_eval(), generating_with(model, new_cache, chunk=chunk):
            runs[name] = run_tasks(lm, opened, limit, None)
    plain = runs[PLAIN]
    rows = {name: compare_scores(run.scores, None if name == PLAIN else plain.scores) for name, run in runs.items()}
    return {
        "rows": rows,
        "cut": {task: n for task, n in plain.cut.items() if task in plain.shots},
        "task_versions": plain.versions,
    }
