"""Named suites of tasks."""

from __future__ import annotations

from pathlib import Path

from laconic.evaluation.task_files import documents_of

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
"""The standard suite by lm-eval's names.

`gsm8k` has no chain of thought (`gsm8k_cot` has one); `wikitext` has whole documents of WikiText-2.
"""


def standard_tasks(data: Path | None) -> tuple[list[str], list[str]]:
    """Return the tasks of the standard suite that can be measured, and those whose documents are missing.

    Args:
        data: Folder of JSONL files. None: all documents come from the Hub.

    Raises:
        ValueError: The folder has documents of none of the tasks.
    """
    if data is None:
        return list(STANDARD), []
    present = [name for name in STANDARD if documents_of(name, data)]
    if not present:
        raise ValueError(
            f"{data} has no file of the standard suite ({', '.join(STANDARD)}); check --data, or leave it out to "
            "take the documents from the Hub"
        )
    return present, [name for name in STANDARD if name not in present]
