"""Calibration of multiple-choice tasks, from the log-likelihoods of choices that lm-eval logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.evaluate.calibration import Predictions, calibration_of, of_choices, pooled


def read_predictions(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Predictions]:
    """By name, the predictions of every multiple-choice task in what `simple_evaluate` returned; tasks of which a
    document has several right choices, or none, are left out. tasks: the tasks themselves, by name."""
    found = {}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
            continue
        # A task with several filters logs its documents once for each.
        chosen = results["samples"][name][0]["filter"] if results["samples"][name] else None
        samples = [s for s in results["samples"][name] if s["filter"] == chosen]
        choices = [task.doc_to_choice(s["doc"]) for s in samples]
        labels = [_label(task, s["doc"], c) for s, c in zip(samples, choices, strict=True)]
        if not labels or None in labels:
            continue
        # Log-likelihoods without the question come after those of the choices where a metric wants them.
        lls = [[float(ll) for ll, _ in s["filtered_resps"][: len(c)]] for s, c in zip(samples, choices, strict=True)]
        found[name] = of_choices(lls, [label for label in labels if label is not None])
    return found


def with_groups(predictions: Mapping[str, Predictions], groups: Mapping[str, Any]) -> dict[str, Predictions]:
    """The same, and before them those of groups whose tasks all have predictions, taken together."""
    found = {}
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        if members and all(member in predictions for member in members):
            found[name] = pooled([predictions[member] for member in members])
    return found | dict(predictions)


def compare_calibration(
    ours: Mapping[str, Predictions], theirs: Mapping[str, Predictions] | None
) -> list[dict[str, Any]]:
    """For each task, calibration with its intervals; beside the original's, paired differences."""
    return [
        {"task": name, "tasks": len(found.strata)} | calibration_of(found, None if theirs is None else theirs[name])
        for name, found in ours.items()
    ]


def _label(task: Any, doc: Any, choices: list[str]) -> int | None:
    """The index of the right choice, as lm-eval takes it; None where it is not one."""
    # Where the contexts are what differs, lm-eval has the answer where the text would be.
    said = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(said, str):
        return choices.index(said) if said in choices else None
    return said if isinstance(said, int) and 0 <= said < len(choices) else None
