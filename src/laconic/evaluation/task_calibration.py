"""Calibration of multiple-choice tasks, from the log-likelihoods of the choices that lm-eval logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.evaluation.calibration import Predictions, choice_predictions, compare_calibration, concatenate


def read_predictions(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Predictions]:
    """Read the predictions of every multiple-choice task.

    Tasks with a document of several right choices, or of none, are left out.

    Args:
        results: Result of lm-eval's `simple_evaluate`.
        tasks: lm-eval's tasks by name.

    Returns:
        Predictions by task.
    """
    predictions = {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
            continue
        # A task with several filters logs its documents once per filter.
        samples = results["samples"][name]
        samples = [s for s in samples if s["filter"] == samples[0]["filter"]]
        choices = [task.doc_to_choice(s["doc"]) for s in samples]
        labels = [_label(task, s["doc"], c) for s, c in zip(samples, choices, strict=True)]
        if not labels or None in labels:
            continue
        # Some metrics add log-likelihoods without the question; they follow those of the choices.
        lls = [[float(ll) for ll, _ in s["filtered_resps"][: len(c)]] for s, c in zip(samples, choices, strict=True)]
        predictions[name] = choice_predictions(lls, [label for label in labels if label is not None])
    return predictions


def add_groups(predictions: Mapping[str, Predictions], groups: Mapping[str, Any]) -> dict[str, Predictions]:
    """Return predictions with those of groups, whose tasks all have predictions, put first.

    Args:
        predictions: Predictions by task.
        groups: lm-eval's groups by name.
    """
    of_groups = {}
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        if members and all(member in predictions for member in members):
            of_groups[name] = concatenate([predictions[member] for member in members])
    return of_groups | dict(predictions)


def calibration_rows(
    model: Mapping[str, Predictions], baseline: Mapping[str, Predictions] | None
) -> list[dict[str, Any]]:
    """Compare the calibration of a model with that of its original, one row per task or group.

    Args:
        model: Predictions of the model by task or group.
        baseline: Predictions of its original by task or group, if there is one.

    Returns:
        Rows with `task`, `tasks` (the number of tasks) and the keys of `compare_calibration`.
    """
    return [
        {"task": name, "tasks": len(predictions.strata)}
        | compare_calibration(predictions, None if baseline is None else baseline[name])
        for name, predictions in model.items()
    ]


def _label(task: Any, doc: Any, choices: list[str]) -> int | None:
    """Return the index of the right choice as lm-eval reads it; None if there is not exactly one."""
    # If the contexts differ instead of the choices, lm-eval's doc_to_text returns the answer.
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, str):
        return choices.index(target) if target in choices else None
    return target if isinstance(target, int) and 0 <= target < len(choices) else None
