"""The runs of a study; the id of a run is a hash of everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from laconic.artifact.identity import read_identity
from laconic.checkpoint.source import Source
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.data.mix import TextSource
from laconic.pipeline.compression import prepare
from laconic.pipeline.provenance import identify
from laconic.recipe import Recipe, load_recipe
from laconic.runtime.inputs import open_input
from laconic.stages.cache import CacheStage
from laconic.stages.pruning import Protect, PruningStage
from laconic.stages.stage import Stage
from laconic.sweep.study import Evaluation, GridSearch, Study, StudyPoint, points
from laconic.train.stage import TrainingStage

# A study with more runs than this is most often a mistake.
MAX_RUNS = 500


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        id: Hash that names the folder and the result of the run.
        values: Labels of the axis values, by recipe key.
        recipe: The recipe to compress by.
        evaluations: What to measure of the artifact.
        baseline: Whether to compare with the original model.
        trust: Permissions of the model's files.
    """

    id: str
    values: dict[str, Any]
    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    baseline: bool
    trust: Trust = UNTRUSTED

    @property
    def name(self) -> str:
        """Axis values of the run, in one line."""
        return describe(self.values)

    def artifact(self, folder: Path) -> Path:
        """Return the folder of the run's artifact.

        Args:
            folder: Folder of the sweep.
        """
        return folder / "runs" / self.id

    def result(self, folder: Path) -> Path:
        """Return the file of the run's result.

        Args:
            folder: Folder of the sweep.
        """
        return folder / "results" / f"{self.id}.json"


def plan_runs(study: Study, *, yes: bool = False, trust: Trust = UNTRUSTED) -> list[Run]:
    """List every run of a study, and check all that can be checked without loading weights.

    Args:
        study: The study.
        yes: Accept more than `MAX_RUNS` runs.
        trust: Permissions of the models' files.

    Returns:
        The runs, in the order of the study's points.

    Raises:
        ValueError: An axis names no key of the recipe, a point is not a valid recipe, a model cannot be opened, two
            runs would write one folder, no recipe has the cache that an evaluation reads through, or there are more
            than `MAX_RUNS` runs.
    """
    selected = list(islice(points(study), None if yes else MAX_RUNS + 1))
    if len(selected) > MAX_RUNS and not yes:
        raise ValueError(
            f"the study has more than {MAX_RUNS} runs; remove values or axes, or pass --yes to run them all"
        )
    if isinstance(study.search, GridSearch):
        _check_conditions(study, selected)
    keys = {axis.key for axis in study.axes} | {key for point in selected for key in point.values}
    recipes = [_recipe(point, keys) for point in selected]
    _check_caches(study, recipes)
    open_once = cache(partial(open_input, trust=trust))
    runs: dict[str, tuple[int, Run]] = {}
    for number, (point, recipe) in enumerate(zip(selected, recipes, strict=True), 1):
        if not recipe.model:
            raise ValueError("no model; write 'model' in the study, or in its base")
        run = replace(_identify(study, point, recipe, open_once(recipe.model)), trust=trust)
        if run.id in runs:
            other, duplicate = runs[run.id]
            raise ValueError(
                f"runs {other} ({duplicate.name}) and {number} ({run.name}) would write one folder, runs/{run.id}: "
                "they make the same artifact; remove one"
            )
        runs[run.id] = number, run
    return [run for _, run in runs.values()]


def texts_of(stage: Stage) -> tuple[TextSource | Protect, ...]:
    """Return the text sets that a stage reads in addition to the calibration set.

    Args:
        stage: The stage.
    """
    if isinstance(stage, TrainingStage):
        return stage.data
    return (stage.protect,) if isinstance(stage, PruningStage) and stage.protect else ()


def describe(values: Mapping[str, Any]) -> str:
    """Describe axis values in one line; keys are shortened to their last part where that is unambiguous.

    Args:
        values: Labels of the axis values, by recipe key.

    Returns:
        Pairs `key=value`, separated by commas; `the base` without values.
    """
    lasts = [key.rpartition(".")[2] for key in values]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(values, lasts, strict=True)}
    return ", ".join(f"{short[key]}={value}" for key, value in values.items()) or "the base"


def forecast_run(run: Run, folder: Path) -> dict[str, Any]:
    """Forecast size and memory of a run, as `laconic compress --dry-run` does.

    Args:
        run: The run.
        folder: Folder of the sweep.

    Returns:
        `bytes_before`, `bytes_after` and `peak_bytes`; or `problem`, the error that the run would fail with; or
        nothing if the artifact of the run exists.
    """
    target = run.artifact(folder).expanduser().resolve()
    if read_identity(target):
        return {}
    try:
        forecast = prepare(None, run.recipe, target, trust=run.trust).forecast
    except (ValueError, OSError) as e:
        return {"problem": " ".join(str(e).split())}
    if forecast is None:
        return {}
    return {key: getattr(forecast, key) for key in ("bytes_before", "bytes_after", "peak_bytes")}


def _recipe(point: StudyPoint, keys: Iterable[str]) -> Recipe:
    try:
        return load_recipe({**point.recipe, "output": None})
    except ValueError as e:
        message = str(e)
        unknown = message.split("'")[1] if message.startswith("unknown key '") else None
        axis = next((key for key in keys if unknown and f"{key}.".startswith(f"{unknown}.")), None)
        if axis:
            raise ValueError(f"axis {axis} names no key of the recipe: {message}") from e
        raise ValueError(f"run with {describe(point.values)}: {message}") from e


def _identify(study: Study, point: StudyPoint, recipe: Recipe, source: Source) -> Run:
    identity = identify(recipe, source, None)
    texts = [recipe.calibration.dataset] if recipe.calibration else []
    texts += [e.text for e in study.evaluations]
    texts += [text.dataset for stage in recipe.stages for text in texts_of(stage)]
    inputs = {
        **identity,
        # Results that are older than the key 'generate' keep their id.
        "evaluations": [e.model_dump(exclude=set() if e.generate else {"generate"}) for e in study.evaluations],
        "baseline": study.baseline,
        "texts": {text: _content(text) for text in texts},
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return Run(digest[:12], point.values, recipe, tuple(study.evaluations), study.baseline)


def _content(text: str) -> str | None:
    """Return the hash of a local file; None for a data set of the Hub."""
    path = Path(text).expanduser()
    if not path.is_file():
        return None
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_caches(study: Study, recipes: Iterable[Recipe]) -> None:
    """Require a cache stage in at least one recipe; recipes without one fail as runs, and the table says so."""
    chunked = next((i for i, e in enumerate(study.evaluations) if e.chunk is not None), None)
    if chunked is not None and not any(isinstance(s, CacheStage) for r in recipes for s in r.stages):
        raise ValueError(
            f"evaluations.{chunked} reads through a quantized cache, and no recipe has one; remove its 'chunk', or "
            "add a cache stage (kivi, kvquant, ...)"
        )


def _check_conditions(study: Study, selected: list[StudyPoint]) -> None:
    varied = {key for point in selected for key in point.values}
    for number, axis in enumerate(study.axes):
        if axis.key not in varied:
            raise ValueError(
                f"axes.{number} ({axis.key}) never applies: no recipe has {describe(axis.when)} written in it; "
                "correct its 'when', and list the axes that set those keys before it"
            )
