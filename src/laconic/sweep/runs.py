"""The runs of a study, each known by a hash of everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from laconic.artifact.workspace import begun_with
from laconic.checkpoint.source import Source, open_source
from laconic.pipeline.compression import prepare
from laconic.pipeline.provenance import identify
from laconic.recipe import Recipe, load_recipe
from laconic.stages.cache import CacheStage
from laconic.sweep.study import Evaluation, Grid, Point, Study, points

# More than these are most often a slip of the pen.
MANY = 500


@dataclass(frozen=True)
class Run:
    """id: the hash, which names its folder and its result. values: what the axes chose, by key, as tables show it."""

    id: str
    values: dict[str, Any]
    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    baseline: bool

    @property
    def name(self) -> str:
        """What it differs by from the others, in one line."""
        return words(self.values)

    def artifact(self, folder: Path) -> Path:
        """Its artifact, in a sweep's folder."""
        return folder / "runs" / self.id

    def result(self, folder: Path) -> Path:
        """The file of its result."""
        return folder / "results" / f"{self.id}.json"


def plan_runs(study: Study, *, yes: bool = False) -> list[Run]:
    """Every run of a study, checked as far as that goes without a model. yes: however many there are.

    Raises: ValueError when an axis names no key of the recipe, a point is no valid recipe, a model cannot be opened,
    two runs would write one folder, none has the cache that is to be read through, or there are more than `MANY`.
    """
    asked = list(islice(points(study), None if yes else MANY + 1))
    if len(asked) > MANY and not yes:
        raise ValueError(
            f"the study has more than {MANY} runs; leave out values or axes, or pass --yes to run them all"
        )
    if isinstance(study.search, Grid):
        _check_conditions(study, asked)
    keys = {axis.key for axis in study.axes} | {key for point in asked for key in point.values}
    recipes = [_recipe(point, keys) for point in asked]
    _check_caches(study, recipes)
    open_once = cache(open_source)
    runs: dict[str, tuple[int, Run]] = {}
    for number, (point, recipe) in enumerate(zip(asked, recipes, strict=True), 1):
        if not recipe.model:
            raise ValueError("no model: name one as 'model' in the study, or in its base")
        run = _identified(study, point, recipe, open_once(recipe.model))
        if run.id in runs:
            other, same = runs[run.id]
            raise ValueError(
                f"runs {other} ({same.name}) and {number} ({run.name}) would write one folder, runs/{run.id}: "
                "they make the same artifact; leave one out"
            )
        runs[run.id] = number, run
    return [run for _, run in runs.values()]


def texts_of(stage: Any) -> tuple[Any, ...]:
    """What a stage reads beside the calibration set."""
    protect = getattr(stage, "protect", None)
    return (*(getattr(stage, "data", None) or ()), *([protect] if protect else ()))


def words(values: Mapping[str, Any]) -> str:
    """What axes chose, in one line; keys by their last part, where that says enough."""
    lasts = [key.rpartition(".")[2] for key in values]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(values, lasts, strict=True)}
    return ", ".join(f"{short[key]}={value}" for key, value in values.items()) or "the base"


def foretell(run: Run, folder: Path) -> dict[str, Any]:
    """What a run would take, by `compress --dry-run`: bytes_before, bytes_after, peak_bytes; all absent when its
    artifact is there already; problem: what stands in its way."""
    target = run.artifact(folder).expanduser().resolve()
    if begun_with(target):
        return {}
    try:
        forecast = prepare(None, run.recipe, target).forecast
    except (ValueError, OSError) as e:
        return {"problem": " ".join(str(e).split())}
    if forecast is None:
        return {}
    return {key: getattr(forecast, key) for key in ("bytes_before", "bytes_after", "peak_bytes")}


def _recipe(point: Point, keys: Iterable[str]) -> Recipe:
    try:
        return load_recipe({**point.recipe, "output": None})
    except ValueError as e:
        said = str(e)
        unknown = said.split("'")[1] if said.startswith("unknown key '") else None
        wrong = next((key for key in keys if unknown and f"{key}.".startswith(f"{unknown}.")), None)
        if wrong:
            raise ValueError(f"axis {wrong} names no key of the recipe: {said}") from e
        raise ValueError(f"run with {words(point.values)}: {said}") from e


def _identified(study: Study, point: Point, recipe: Recipe, source: Source) -> Run:
    made_of = identify(recipe, source, None)
    texts = [recipe.calibration.dataset] if recipe.calibration else []
    texts += [e.text for e in study.evaluations]
    texts += [text.dataset for stage in recipe.stages for text in texts_of(stage)]
    told = {
        **made_of,
        # Runs that were measured before there was a 'generate' are the same without it.
        "evaluations": [e.model_dump(exclude=set() if e.generate else {"generate"}) for e in study.evaluations],
        "baseline": study.baseline,
        "texts": {text: _content(text) for text in texts},
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Run(digest[:12], point.values, recipe, tuple(study.evaluations), study.baseline)


def _content(text: str) -> str | None:
    """The hash of a local file; nothing of what has a name on the Hub."""
    path = Path(text).expanduser()
    if not path.is_file():
        return None
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hashed(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_caches(study: Study, recipes: Iterable[Recipe]) -> None:
    """Where some have a cache, those without are told in the table."""
    through = next((i for i, asked in enumerate(study.evaluations) if asked.chunk is not None), None)
    if through is not None and not any(isinstance(s, CacheStage) for r in recipes for s in r.stages):
        raise ValueError(
            f"evaluations.{through} reads through the artifact's own cache, and no recipe has one; leave out its "
            "'chunk', or add a stage for the cache (kivi, kvquant, ...)"
        )


def _check_conditions(study: Study, asked: list[Point]) -> None:
    met = {key for point in asked for key in point.values}
    for number, axis in enumerate(study.axes):
        if axis.key not in met:
            raise ValueError(
                f"axes.{number} ({axis.key}) never applies: no recipe has {words(axis.when)} written in it; "
                "mend its 'when', and list the axes that set that before it"
            )
