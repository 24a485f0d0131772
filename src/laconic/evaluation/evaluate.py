"""`laconic.evaluation`: one function for all kinds of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laconic.evaluation.options import DomainOptions, EvalOptions, LongOptions, TaskOptions, TextOptions


def evaluate(model: str | Path, options: EvalOptions | None = None) -> dict[str, Any]:
    """Measure a model, and save the result in `results/` if it is an artifact.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: Options of the measurement; their type says which. None: perplexity on WikiText-2.

    Returns:
        The result, as it is saved.

    Raises:
        ValueError: An option does not fit the model, or a text or a task cannot be read.
    """
    options = options or TextOptions()
    # Each kind is imported on its own: tasks need lm-eval, texts do not.
    if isinstance(options, TaskOptions):
        from laconic.evaluation.tasks import evaluate_tasks

        return evaluate_tasks(model, options)
    if isinstance(options, LongOptions):
        from laconic.evaluation.long_context import evaluate_long

        return evaluate_long(model, options)
    if isinstance(options, DomainOptions):
        from laconic.evaluation.domains import evaluate_domains

        return evaluate_domains(model, options)
    from laconic.evaluation.text import evaluate_text

    return evaluate_text(model, options)
