"""Which tasks a named suite has: over the Hub, or those of them that a folder of local files has."""

from __future__ import annotations

from pathlib import Path

from laconic.evaluate.task_files import documents_of

STANDARD = (
    "mmlu",
    "hellaswag",
    "arc_challenge",
    "arc_easy",
    "boolq",
    "winogrande",
    "gsm8k",
    "wikitext",
    "c4",
    "longbench",
)
"""By lm-eval's names. `gsm8k` is the one that does not ask for a chain of thought (`gsm8k_cot` does); `wikitext` is
WikiText-2, whole documents."""


def standard_tasks(data: Path | None) -> tuple[list[str], list[str]]:
    """The tasks of the standard suite that are measured, and those that are left out since `data`, a folder of JSONL
    files, has not their documents; without a folder, all come from the Hub.

    Raises: ValueError for a folder that has none of them.
    """
    if data is None:
        return list(STANDARD), []
    there = [name for name in STANDARD if documents_of(name, data)]
    if not there:
        raise ValueError(
            f"{data} has no file of the standard suite ({', '.join(STANDARD)}); check --tasks-data, or leave it out to "
            "take the documents from the Hub"
        )
    return there, [name for name in STANDARD if name not in there]
