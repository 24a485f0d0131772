"""Recipe in, artifact out.

Neighbouring stages that treat linears, blocks or the cache share one walk; a stage that needs the model whole stands by
itself. Each such *step* reads a checkpoint folder and writes one, the last of them the artifact, the others under
`OUTPUT.steps`, where an interrupted run finds them again. Many recipes may share a folder of steps: each is there under
a hash of what it is made of, is made by the first that needs it, and stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.artifact.locks import wait_for_lock
from laconic.artifact.workspace import check_identity, check_output, differing_keys, read_identity
from laconic.cards.writing import write_cards
from laconic.checkpoint.source import Source, build_skeleton, open_source
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.pipeline.model_step import run_model_step
from laconic.pipeline.provenance import identify
from laconic.pipeline.walking import Prepared, calibration_ids, device_of, prepare_walk, run_walk
from laconic.recipe import Recipe, load_recipe
from laconic.stages.model import ModelStage
from laconic.train.ranks import is_main
from laconic.walk.forecast import Forecast

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Step:
    """Stages that go together: those of one walk, or one that needs the model whole. first: the number of the first in
    the recipe. walk: what a walk will do, as far as the shape of the original tells."""

    first: int
    stages: tuple[Any, ...]
    walk: Prepared | None
    output: Path
    identity: dict[str, Any]


@dataclass(frozen=True)
class Composed:
    """A recipe of several steps that passed every check. windows: the calibration set, (samples, tokens). shared:
    whether steps but the last are for other recipes too."""

    recipe: Recipe
    source: Source
    steps: tuple[Step, ...]
    windows: Tensor | None
    output: Path
    trust: Trust
    shared: bool = False

    @property
    def forecast(self) -> Forecast | None:
        """Of the last walk, as if nothing before it reshaped the model; None where there is no walk."""
        return next((s.walk.forecast for s in reversed(self.steps) if s.walk), None)


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
    """Compress a model by a recipe; continue an interrupted compression.

    Args:
        model: Folder of the model or its name on the Hub, in place of the recipe's.
        recipe: Name of a gallery recipe, a YAML file, or the keys of a recipe.
        output: Folder of the artifact, in place of the recipe's.
        overrides: Changes of the recipe, each `key.path=value`.
        overwrite: Whether to replace an existing artifact, once the new one is complete.
        trust: What the files of the model may do.
        steps: Folder for the results of steps but the last; recipes with equal first steps share it. None: a folder
            beside the output, deleted in the end.
        report: Called with events: blocks, linears with their errors, training steps, notes.

    Returns:
        The artifact.

    Raises:
        ValueError: The recipe, the model or the output cannot be used, and nothing was written; or the weights or the
            activations hold NaN or infinity.
    """
    prepared = prepare(
        model,
        recipe,
        output,
        overrides=overrides,
        overwrite=overwrite,
        trust=trust,
        steps=steps,
    )
    return run(prepared, overwrite=overwrite, report=report)


def prepare(
    model: str | None,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path | None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
    steps: Path | None = None,
) -> Prepared | Composed:
    """Everything up to the first byte of work. Raises: ValueError, one line that names the fix."""
    loaded = load_recipe(recipe, overrides)
    name, where = model or loaded.model, str(output) if output else loaded.output
    if not name:
        raise ValueError("no model: name one on the command line, or as 'model' in the recipe")
    if not where:
        raise ValueError("no output: give --output DIR, or 'output' in the recipe")
    loaded = loaded.model_copy(update={"model": name, "output": where})
    target = Path(where).expanduser().resolve()
    # The first process of a launch may have begun by now, or be done: what is there is its own.
    overwrite = overwrite or not is_main()
    source = open_source(name, trust=trust)
    if target in (folder := source.folder.resolve(), *folder.parents):
        raise ValueError(f"output {target} is the model's own folder, or holds it; choose another")
    check_output(target, overwrite=overwrite)
    if any(isinstance(s, ModelStage) for s in loaded.stages):
        return _compose(loaded, source, target, steps, overwrite=overwrite, trust=trust)
    return prepare_walk(loaded, source, target, overwrite=overwrite, trust=trust)


def run(prepared: Prepared | Composed, *, overwrite: bool = False, report: Report = lambda _: None) -> Artifact:
    """ModelTask a prepared recipe, or go on with one that was interrupted. Of the processes of a launch the first does all
    of it, and the others help where a model is trained."""
    if isinstance(prepared, Prepared):
        if not is_main():
            return Artifact(prepared.output)
        return run_walk(prepared, overwrite=overwrite, report=report, describe=_describing(prepared, report))
    before: Path | None = None
    steps = len(prepared.steps)
    for number, step in enumerate(prepared.steps):
        report({"event": "step", "step": number, "steps": steps, "methods": [s.method for s in step.stages]})
        if number == steps - 1:
            before = _work(prepared, number, before, overwrite, report)
            continue
        with wait_for_lock(step.output) if prepared.shared else nullcontext():
            made = read_identity(step.output) == step.identity
            before = step.output if made else _work(prepared, number, before, overwrite, report)
    if is_main() and not prepared.shared:
        _forget(_kept(prepared.output))
    return Artifact(prepared.output)


def _describing(prepared: Prepared | Composed, report: Report) -> Callable[[Path], None]:
    """What writes the cards; the artifact comes out whole if that fails."""

    def describe(folder: Path) -> None:
        name = prepared.output.name
        try:
            said = write_cards(folder, prepared.recipe, prepared.source, name=name, trust=prepared.trust)
        except (ValueError, OSError) as e:
            said = [f"the cards were not written ({e}); run 'laconic card {prepared.output}'"]
        for remark in said:
            report({"event": "note", "said": remark})

    return describe


def _compose(
    recipe: Recipe, source: Source, output: Path, shared: Path | None, *, overwrite: bool, trust: Trust
) -> Composed:
    device_of(recipe)
    if not shared and is_main():
        _check_kept(output, source)
    reasons = [s.calibration_reason for s in recipe.stages if s.needs.calibration]
    windows = None
    if reasons:
        windows = calibration_ids(recipe, source, reasons[0], trust=trust)
    groups = _groups(recipe.stages)
    model = build_skeleton(source.config, source.dtype, trust=trust)
    steps: list[Step] = []
    before = _Before()
    for number, (first, stages) in enumerate(groups):
        upto = recipe.model_copy(update={"stages": recipe.stages[: first + len(stages)]})
        before = _in_order(first, stages[0], before, source, model)
        identity = identify(upto, source, windows) | ({"texts": before.texts} if before.texts else {})
        last = number == len(groups) - 1
        kept = shared / _hash(identity) if shared else _kept(output) / f"{number + 1}"
        target = output if last else kept
        walk = None
        if not isinstance(stages[0], ModelStage):
            walk = prepare_walk(
                recipe.model_copy(update={"stages": stages}),
                source,
                target,
                identity=identity,
                windows=windows,
                first=first,
                overwrite=overwrite,
                trust=trust,
            )
            cache = f"stages.{first + len(stages) - 1} ({walk.plan.cache[0].method})" if walk.plan.cache else None
            before = replace(before, quantized=before.quantized or bool(walk.plan.schemes), cache=cache)
            identity = walk.identity
        check_identity(target, identity, overwrite=overwrite)
        made = None if last else read_identity(target)
        if made not in (None, identity) and not overwrite:
            raise ValueError(
                f"{target} was made by another recipe (different: {differing_keys(made or {}, identity)}); "
                "finish that, choose another output, or pass --overwrite"
            )
        steps.append(Step(first, stages, walk, target, identity))
    return Composed(recipe, source, tuple(steps), windows, output, trust, bool(shared))


@dataclass(frozen=True)
class _Before:
    """What earlier stages leave. quantized: codes. reshaped: another shape. adapters: which of them left some beside
    the weights. cache: which of them says how the cache is stored. texts: what stages of their own read, as a hash, by
    key of the recipe."""

    quantized: bool = False
    reshaped: bool = False
    adapters: int | None = None
    cache: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def _in_order(first: int, stage: Any, before: _Before, source: Source, model: PreTrainedModel) -> _Before:
    """Let a stage that begins a step say what it cannot do, and what it will leave. first: its number.

    Raises: ValueError where it cannot come after those before it.
    """
    told = f"stages.{first} ({stage.method})"
    if before.adapters is not None:
        raise ValueError(
            f"{told} comes after stages.{before.adapters}, whose adapters stay beside the weights that they were "
            "trained for; list it before that stage"
            + ("" if before.quantized else ", or leave out keep_adapters there")
        )
    if not isinstance(stage, ModelStage):
        if before.quantized:
            raise ValueError(
                f"{told} comes after a stage that was quantized and then trained; list it before the training"
            )
        return before
    if first == 0 and source.checkpoint.pickled:
        raise ValueError(
            f"{told} needs the model whole, and reads no pickle weights; convert them to safetensors first "
            "(transformers' save_pretrained writes those)"
        )
    if before.quantized and not stage.accepts_codes:
        raise ValueError(f"{told} changes weights, and earlier stages have quantized them; list it before them")
    kept = stage.leaves_adapters(quantized=before.quantized)
    if before.cache and not kept:
        raise ValueError(f"{told} changes the model whose cache {before.cache} looks at; list it before that stage")
    try:
        texts = stage.check(source, model, quantized=before.quantized, reshaped=before.reshaped)
    except ValueError as e:
        raise ValueError(f"{told}: {e}") from e
    read = {f"stages.{first}.{key}": sha for key, sha in texts.items()}
    return replace(
        before,
        reshaped=before.reshaped or stage.reshapes,
        adapters=first if kept else None,
        texts={**before.texts, **read},
    )


def _work(prepared: Composed, number: int, before: Path | None, overwrite: bool, report: Report) -> Path:
    """One step, from what the step before left. Returns its folder."""
    step = prepared.steps[number]
    # What earlier steps make is no artifact that anyone keeps.
    describe = _describing(prepared, report) if number == len(prepared.steps) - 1 else lambda _: None
    if step.walk:
        return _walk(prepared, step, before, overwrite, report, describe).path if is_main() else step.output
    if before and not is_main():
        _await(before, prepared.steps[number - 1].identity)
    original = prepared.source.folder
    return run_model_step(
        step.stages[0],
        step.first,
        prepared.recipe,
        before or original,
        original,
        prepared.windows,
        step.output,
        step.identity,
        before=before,
        overwrite=overwrite,
        report=report,
        trust=prepared.trust,
        describe=describe,
    ).path


def _walk(
    composed: Composed,
    step: Step,
    before: Path | None,
    overwrite: bool,
    report: Report,
    describe: Callable[[Path], None],
) -> Artifact:
    """A walk over what the step before left, which may have another shape than the original."""
    assert step.walk is not None
    prepared = step.walk
    if before:
        prepared = prepare_walk(
            prepared.recipe,
            open_source(str(before), trust=composed.trust),
            step.output,
            identity=step.identity,
            windows=composed.windows,
            first=step.first,
            overwrite=overwrite,
            trust=composed.trust,
        )
    return run_walk(prepared, before=before, overwrite=overwrite, report=report, describe=describe)


def _groups(stages: Sequence[Any]) -> list[tuple[int, tuple[Any, ...]]]:
    """Stages that go together, each group with the number of its first."""
    numbered = enumerate(stages)
    together = groupby(numbered, key=lambda item: item[0] if isinstance(item[1], ModelStage) else None)
    groups = [list(group) for _, group in together]
    return [(group[0][0], tuple(stage for _, stage in group)) for group in groups]


def _await(folder: Path, identity: Mapping[str, Any]) -> None:
    """Wait until the first process has made what the next step begins with, however long that takes."""
    while read_identity(folder) != identity:
        time.sleep(0.5)


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept(output: Path) -> Path:
    """Where what earlier steps made is kept until the last one is done."""
    return output.with_name(output.name + ".steps")


def _check_kept(output: Path, source: Source) -> None:
    """Raises: ValueError unless everything in the folder of earlier steps is ours, since it goes in the end."""
    kept, model = _kept(output), source.folder.resolve()
    if not kept.exists():
        return
    ours = kept.is_dir() and all(_is_step(entry) or entry.suffix == ".last-good" for entry in kept.iterdir())
    if not ours or kept in (model, *model.parents):
        raise ValueError(
            f"{kept}, where what earlier steps make is kept until the last is done, holds something else; move it "
            "away, or choose another output"
        )


def _is_step(entry: Path) -> bool:
    number, _, rest = entry.name.partition(".")
    if not number.isdecimal() or rest not in ("", "partial") or not entry.is_dir() or entry.is_symlink():
        return False
    # One that was just begun is empty, but for a recipe that is being written.
    return read_identity(entry) is not None or all(file.suffix == ".writing" for file in entry.iterdir())


def _forget(kept: Path) -> None:
    """Remove what earlier steps made, and nothing else."""
    for entry in kept.iterdir() if kept.is_dir() else ():
        if _is_step(entry):
            shutil.rmtree(entry, ignore_errors=True)
    with suppress(OSError):
        kept.rmdir()
