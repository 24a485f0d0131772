"""Whether the texts that runs need are there and long enough: told once, before the first run, and not by each."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from laconic.checkpoint.source import Source, load_tokenizer, open_source
from laconic.data.text import HUB_TEXTS, evaluation_windows, read_documents, read_rows
from laconic.pipeline.walking import calibration_ids
from laconic.recipe import Recipe
from laconic.sweep.runs import Run, texts_of
from laconic.sweep.study import Evaluation


def check_texts(runs: Iterable[Run]) -> None:
    """Read as much of every text as is needed to know, with the tokenizer of the model that is to read it.

    Raises: ValueError, with the key of the study, for a text that cannot be read or is too short, for windows that are
    longer than a model's context, and for more openings to continue than there are windows.
    """
    seen: set[Any] = set()
    open_once = cache(open_source)
    for run in runs:
        assert run.recipe.model is not None
        source = open_once(run.recipe.model)
        for number, asked in enumerate(run.evaluations):
            key: Any = (run.recipe.model, asked.text, asked.context_length, _needed(asked))
            if key not in seen:
                seen.add(key)
                _said_of(f"evaluations.{number}", _evaluated, source, asked)
        if (shortest := _calibrated(run.recipe)) is not None:
            key = (run.recipe.model, shortest.calibration)
            if key not in seen:
                seen.add(key)
                _said_of(f"run with {run.name}", calibration_ids, shortest, source, _needing(shortest)[0])
        for stage in run.recipe.stages:
            for text in texts_of(stage):
                if text.dataset not in seen:
                    seen.add(text.dataset)
                    _said_of(f"run with {run.name}: {stage.method}", _opened, text)


def _evaluated(source: Source, asked: Evaluation) -> None:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = min(2048, limit) if asked.context_length is None else asked.context_length
    if length > limit:
        raise ValueError(f"context_length {length} is longer than the model's context of {limit}; lower it")
    documents = read_documents(**HUB_TEXTS.get(asked.text, {"dataset": asked.text}))
    found = len(evaluation_windows(documents, load_tokenizer(source.folder), length=length, limit=_needed(asked)))
    if asked.generate and asked.generate > found:
        raise ValueError(f"generate {asked.generate} is more than the {found} windows of the text; ask for fewer")


def _needed(asked: Evaluation) -> int:
    """Windows that have to be seen: one, or where openings are continued as many, if the text has them."""
    continued = asked.generate or 1
    return continued if asked.windows is None else min(continued, asked.windows)


def _opened(text: Any) -> None:
    next(iter(read_rows(text.dataset, split=text.split, config=text.config)), None)


def _needing(recipe: Recipe) -> list[str]:
    """What of a recipe wants calibration text."""
    return [getattr(s, "needing", s.method) for s in recipe.stages if s.observes or getattr(s, "surveys", False)]


def _calibrated(recipe: Recipe) -> Recipe | None:
    """The recipe with one calibration sample, which is as much as a check reads; None where it needs none."""
    if not _needing(recipe):
        return None
    if recipe.calibration is None:
        return recipe
    one = recipe.calibration.model_copy(update={"num_calibration_samples": 1})
    return recipe.model_copy(update={"calibration": one})


def _said_of(where: str, check: Any, *asked: Any) -> None:
    try:
        check(*asked)
    except (ValueError, OSError) as e:
        raise ValueError(f"{where}: {' '.join(str(e).split())}") from e
