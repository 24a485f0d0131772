"""LongBench by lm-eval, answered through each cache: the same prompts, so that differences are paired by document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.evaluate.harness import open_hub, require_lm_eval, run_tasks, silence
from laconic.evaluate.longbench import is_longbench
from laconic.evaluate.recovery import compare
from laconic.evaluate.task_files import open_local
from laconic.evaluate.through_cache import PLAIN, Caches
from laconic.kv.open import generating_with

Opened = tuple[list[Any], Any]


def open_longbench(names: Sequence[str], data: str | Path | None, context_length: int) -> Opened:
    """lm-eval's tasks and groups of these names, and their manager. data: a folder of local files, else the Hub.

    Raises: ValueError when they cannot be had, or their answers do not fit a context of so many tokens.
    """
    require_lm_eval()
    with silence():
        opened, manager = open_local(names, Path(data), None) if data else open_hub(names)
        tasks = manager.load(opened)["tasks"]
    for name, task in tasks.items():
        answer = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
        # A prompt cut in its middle has one token of either half at least.
        if answer + 2 > context_length:
            raise ValueError(f"answers of '{name}' take {answer} tokens, and the context has {context_length}")
    return opened, manager


def check_names(names: Sequence[str]) -> None:
    """Raises: ValueError for a task that is not of LongBench."""
    for name in names:
        if not is_longbench(name):
            raise ValueError(
                f"--suite long measures LongBench's tasks alone (longbench, longbench_hotpotqa, ...), not '{name}'; "
                "leave out --suite for others"
            )


def score_by_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Caches,
    opened: Opened,
    *,
    context_length: int,
    chunk: int,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Of every cache, rows as `recovery.compare` has them, the 16-bit cache being the original.

    Prompts of more than context_length tokens, less those of the answer, lose their middle. They are read in chunks of
    so many tokens, so that later ones see what the cache made of earlier ones.

    Returns: `rows` by cache; `cut`, of each task how many prompts lost their middle; `task_versions`, lm-eval's.
    Raises: ValueError when the model puts out NaN or infinity.
    """
    from laconic.evaluate.lm import OpenedLM

    runs = {}
    lm = OpenedLM(model, tokenizer, context_length=context_length, batch_size=batch_size)
    for name, new_cache in caches.items():
        lm.cut.clear()
        lm.refused.clear()
        with silence(), generating_with(model, new_cache, chunk=chunk):
            runs[name] = run_tasks(lm, *opened, limit, None)
    plain = runs[PLAIN]
    rows = {name: compare(run.scores, None if name == PLAIN else plain.scores) for name, run in runs.items()}
    return {
        "rows": rows,
        "cut": {task: n for task, n in plain.cut.items() if task in plain.shots},
        "task_versions": plain.versions,
    }
