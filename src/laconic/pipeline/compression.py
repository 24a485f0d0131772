"""From a recipe to an artifact: `prepare` checks everything, `run` works the steps or goes on with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.artifact.identity import read_identity
from laconic.artifact.locks import wait_for_lock
from laconic.artifact.workspace import Workspace, check_output
from laconic.cards.writing import write_cards
from laconic.checkpoint.source import open_source
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.pipeline.model_step import help_model_step, run_model_step
from laconic.pipeline.pipeline import Pipeline, build_pipeline
from laconic.pipeline.step_folders import remove_steps, wait_for_step
from laconic.pipeline.walk_step import plan_walk, run_walk
from laconic.recipe import Recipe, load_recipe
from laconic.runtime.inputs import open_input
from laconic.train.ranks import is_main

Report = Callable[[Mapping[str, Any]], None]


def compress(
    model: str | None = None,
    recipe: str | Path | dict[str, Any] | Recipe = "gptq-w4a16",
    output: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
    steps: Path | None = None,
    report: Report = lambda _: None,
) -> Artifact:
    """Compress a model.

    Args:
        model: folder or Hub name, in place of the recipe's.
        recipe: name of a gallery recipe, a YAML file, or the keys of a recipe.
        output: folder of the artifact, in place of the recipe's.
        overrides: `key.path=value`, as `--set` takes them.
        overwrite: replace an artifact that is there, and remove what another recipe has begun.
        trust: what the files of the model may do.
        steps: a folder of steps that recipes with the same first steps share, and keep.
        report: called with an event for each block and linear.

    Returns:
        The artifact.

    Raises:
        ValueError: for anything that the caller can mend; nothing is written then.
    """
    pipeline = prepare(model, recipe, output, overrides=overrides, overwrite=overwrite, trust=trust, steps=steps)
    return run(pipeline, overwrite=overwrite, report=report)


def prepare(
    model: str | None,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path | None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
    steps: Path | None = None,
) -> Pipeline:
    """Do everything up to the first byte of work.

    Args:
        model: folder or Hub name, in place of the recipe's.
        recipe: name of a gallery recipe, a YAML file, or the keys of a recipe.
        output: folder of the artifact, in place of the recipe's.
        overrides: `key.path=value`, as `--set` takes them.
        overwrite: whether an artifact in `output`, or what another recipe has begun there, may be replaced.
        trust: what the files of the model may do.
        steps: a folder of steps that recipes with the same first steps share, and keep.

    Returns:
        The pipeline, for `run`.

    Raises:
        ValueError: in one line that names the fix.
    """
    loaded = load_recipe(recipe, overrides)
    name, folder = model or loaded.model, str(output) if output else loaded.output
    if not name:
        raise ValueError("no model: name one on the command line, or as 'model' in the recipe")
    if not folder:
        raise ValueError("no output: give --output DIR, or 'output' in the recipe")
    loaded = loaded.model_copy(update={"model": name, "output": folder})
    target = Path(folder).expanduser().resolve()
    # The first process of a launch may have begun or finished: what is there is its own.
    overwrite = overwrite or not is_main()
    source = open_input(name, trust=trust)
    if target in (original := source.folder.resolve(), *original.parents):
        raise ValueError(f"output {target} is the model's own folder, or holds it; choose another")
    check_output(target, overwrite=overwrite)
    return build_pipeline(loaded, source, target, shared=steps, overwrite=overwrite, trust=trust)


def run(pipeline: Pipeline, *, overwrite: bool = False, report: Report = lambda _: None) -> Artifact:
    """Work the steps of a pipeline, or go on with steps that were interrupted.

    Of the processes of a launch the first does all of it; the others help where a model is trained.

    Args:
        pipeline: of `prepare`.
        overwrite: as in `compress`.
        report: as in `compress`.

    Returns:
        The artifact.

    Raises:
        ValueError: if a stage cannot treat the model, or another process holds the folder; what is finished remains.
    """
    before: Path | None = None
    count = len(pipeline.steps)
    for number, step in enumerate(pipeline.steps):
        if not pipeline.is_one_walk:
            methods = [s.method for s in step.stages]
            report({"event": "step", "step": number, "steps": count, "methods": methods})
        if number == count - 1:
            _run_step(pipeline, number, before, overwrite, report)
            break
        with wait_for_lock(step.output) if pipeline.shared else nullcontext():
            if read_identity(step.output) != step.identity:
                _run_step(pipeline, number, before, overwrite, report)
        before = step.output
    if is_main() and not pipeline.shared and not pipeline.is_one_walk:
        remove_steps(pipeline.output)
    return Artifact(pipeline.output)


def _run_step(pipeline: Pipeline, number: int, before: Path | None, overwrite: bool, report: Report) -> None:
    """Work one step. before: the folder that the step before has written."""
    step = pipeline.steps[number]
    if not is_main():
        if step.walk is None:
            if before:
                wait_for_step(before, pipeline.steps[number - 1].identity)
            help_model_step(pipeline, step, before, report)
        return
    # Only the artifact has cards: folders of earlier steps are removed.
    describe = _card_writer(pipeline, report) if number == len(pipeline.steps) - 1 else lambda _: None
    if step.walk is None:
        run_model_step(pipeline, step, before, overwrite=overwrite, report=report, describe=describe)
        return
    walk = step.walk
    if before:
        # The step before may have changed the shape: links, taps and sizes are found anew in its checkpoint.
        planned = plan_walk(walk.recipe, open_source(str(before), trust=pipeline.trust), step.first, pipeline.trust)
        walk = replace(planned, domains=walk.domains)
    with Workspace(step.output, step.identity, walk.shards, overwrite=overwrite) as workspace:
        run_walk(walk, pipeline.windows, workspace, before=before, report=report, describe=describe)


def _card_writer(pipeline: Pipeline, report: Report) -> Callable[[Path], None]:
    """Return the function that writes the cards; the artifact is finished also if that fails."""

    def describe(folder: Path) -> None:
        name = pipeline.output.name
        try:
            remarks = write_cards(folder, pipeline.recipe, pipeline.source, name=name, trust=pipeline.trust)
        except (ValueError, OSError) as e:
            remarks = [f"the cards were not written ({e}); run 'laconic card {pipeline.output}'"]
        for remark in remarks:
            report({"event": "note", "message": remark})

    return describe
