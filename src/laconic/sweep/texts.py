"""Check once, before the first run, that every text of a study can be read and is long enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

from laconic.checkpoint.source import Source, load_tokenizer
from laconic.checkpoint.trust import Trust
from laconic.data.text import HUB_TEXTS, evaluation_windows, read_documents, read_rows
from laconic.pipeline.calibration import calibration_ids
from laconic.recipe import Recipe
from laconic.runtime.inputs import open_input
from laconic.sweep.runs import Run, texts_of
from laconic.sweep.study import Evaluation


def check_texts(runs: Iterable[Run]) -> None:
    """Check the texts of runs: read only as much of each as is necessary, with the tokenizer of its model.

    Args:
        runs: The runs that are not done.

    Raises:
        ValueError: A text cannot be read or is too short, a window is longer than the context of a model, or
            `generate` exceeds the number of windows. The message names the key of the study.
    """
    checked: set[Any] = set()
    open_once = cache(open_input)
    for run in runs:
        assert run.recipe.model is not None
        source = open_once(run.recipe.model, trust=run.trust)
        for number, evaluation in enumerate(run.evaluations):
            key: Any = (run.recipe.model, evaluation.text, evaluation.context_length, _windows_needed(evaluation))
            if key not in checked:
                checked.add(key)
                _locate_errors(f"evaluations.{number}", _check_evaluation, source, evaluation, run.trust)
        if (shortest := _one_sample(run.recipe)) is not None:
            key = (run.recipe.model, shortest.calibration)
            if key not in checked:
                checked.add(key)
                method = _calibrated_methods(shortest)[0]
                ids = partial(calibration_ids, trust=run.trust)
                _locate_errors(f"run with {run.name}", ids, shortest, source, method)
        for stage in run.recipe.stages:
            for text in texts_of(stage):
                if text.dataset not in checked:
                    checked.add(text.dataset)
                    _locate_errors(f"run with {run.name}: {stage.method}", _read_first_row, text)


def _check_evaluation(source: Source, evaluation: Evaluation, trust: Trust) -> None:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = min(2048, limit) if evaluation.context_length is None else evaluation.context_length
    if length > limit:
        raise ValueError(f"context_length {length} is longer than the model's context of {limit}; lower it")
    documents = read_documents(**HUB_TEXTS.get(evaluation.text, {"dataset": evaluation.text}))
    tokenizer, needed = load_tokenizer(source.folder, trust=trust), _windows_needed(evaluation)
    windows = len(evaluation_windows(documents, tokenizer, length=length, limit=needed))
    if evaluation.generate and evaluation.generate > windows:
        raise ValueError(f"generate {evaluation.generate} is more than the {windows} windows of the text; lower it")


def _windows_needed(evaluation: Evaluation) -> int:
    """Return how many windows the check must read: one, or one per opening to continue."""
    openings = evaluation.generate or 1
    return openings if evaluation.windows is None else min(openings, evaluation.windows)


def _read_first_row(text: Any) -> None:
    next(iter(read_rows(text.dataset, split=text.split, config=text.config)), None)


def _calibrated_methods(recipe: Recipe) -> list[str]:
    """Return the methods of a recipe that need calibration text."""
    return [s.proposed_needs.reason or s.method for s in recipe.stages if s.proposed_needs.calibration]


def _one_sample(recipe: Recipe) -> Recipe | None:
    """Return the recipe with one calibration sample, enough for a check; None for a recipe without calibration."""
    if not _calibrated_methods(recipe):
        return None
    if recipe.calibration is None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"num_calibration_samples": 1})
    return recipe.model_copy(update={"calibration": calibration})


def _locate_errors(location: str, check: Callable[..., object], *arguments: Any) -> None:
    """Run a check, and put its location in the study before the message of its error."""
    try:
        check(*arguments)
    except (ValueError, OSError) as e:
        raise ValueError(f"{location}: {' '.join(str(e).split())}") from e
