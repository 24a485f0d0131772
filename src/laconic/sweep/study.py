"""Study files: a base recipe, axes that vary its keys, evaluations of each artifact; and the points of a study."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from laconic.config import Config
from laconic.recipe import Location, apply_override, explain_error, parse_yaml, read_recipe, set_path

Scalar = str | int | float | bool


class Evaluation(Config):
    """One evaluation of every artifact of a study, with the arguments of `laconic eval text`.

    Attributes:
        text: Text file, Hub data set, or `wikitext2` or `c4`.
        context_length: Tokens per window; None for the model's context, at most 2048.
        windows: Number of windows; None for the whole text.
        chunk: Read each window through the artifact's own key-value cache, this many tokens at a time, as
            `laconic eval long` does. None reads a window in one forward pass, without the quantized cache.
        dtype: Arithmetic of the forward passes; None for the default of `laconic eval`.
        generate: Number of openings of the text that the artifact, and the original, continue.
    """

    text: str = "wikitext2"
    context_length: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=1)
    chunk: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    generate: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if self.generate and self.chunk:
            raise ValueError("'generate' does not work with 'chunk'; remove one of the two")
        return self


class StudyAxis(Config):
    """One key of the recipe and the values that a study gives it.

    Attributes:
        key: Dotted path of a recipe key, such as `stages.0.group_size`; `stages` for whole lists of stages.
        values: A list of values, or a mapping from names, which tables show, to values.
        when: Condition of the axis: keys and the value, or list of values, that the recipe must have written for each
            key, after the base and the earlier axes. Where the condition does not hold, `key` stays unchanged.
    """

    key: str = Field(min_length=1)
    values: list[Any] | dict[Scalar, Any] = Field(min_length=1)
    when: dict[str, Any] = Field(default_factory=dict)

    @field_validator("values", mode="before")
    @classmethod
    def _are_choices(cls, values: Any) -> Any:
        named = isinstance(values, dict) and all(isinstance(name, Scalar) for name in values)
        if not named and not isinstance(values, list):
            raise ValueError("write a list, as in [32, 64], or a mapping of names to values")
        return values

    @property
    def choices(self) -> list[tuple[Any, Any]]:
        """Pairs of the label that tables show and the value."""
        if isinstance(self.values, dict):
            return list(self.values.items())
        return [(_label(v), v) for v in self.values]

    def applies(self, recipe: Mapping[str, Any]) -> bool:
        """Return whether a recipe meets the condition `when`.

        Args:
            recipe: Keys and values of a recipe, not validated.
        """
        return all(_value_at(recipe, key) in (v if isinstance(v, list) else [v]) for key, v in self.when.items())


class GridSearch(Config):
    """Search over the full product of all axes.

    Attributes:
        kind: `grid`.
    """

    kind: Literal["grid"] = "grid"


class ListSearch(Config):
    """Search over an explicit list of runs.

    Attributes:
        kind: `list`.
        runs: One mapping from recipe keys to values per run.
    """

    kind: Literal["list"] = "list"
    runs: list[dict[str, Any]] = Field(min_length=1)


class RandomSearch(Config):
    """Search over distinct random points of the grid.

    Attributes:
        kind: `random`.
        n: Number of points; a grid with fewer points is searched whole.
        seed: Seed of the draws.
    """

    kind: Literal["random"] = "random"
    n: int = Field(ge=1)
    seed: int = 0


class Resources(Config):
    """Resources of one run.

    Attributes:
        cpus: Processor cores; None for all cores of a machine.
        gpus: Number of GPUs, or a fraction of one; None for one GPU on machines with GPUs.
    """

    cpus: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)


class Study(Config):
    """A study: a base recipe, the axes that vary it, and the evaluations of every artifact.

    Attributes:
        base: Gallery name, recipe file, or recipe.
        model: Model that replaces the base's.
        axes: Keys to vary.
        search: Points of the grid to run.
        seeds: Recipe seeds; every point runs once with each of them.
        evaluations: What to measure of each artifact.
        baseline: Whether to compare each artifact with the original model.
        resources: Resources of one run.
    """

    base: str | dict[str, Any]
    model: str | None = None
    axes: list[StudyAxis] = Field(default_factory=list)
    search: Annotated[GridSearch | ListSearch | RandomSearch, Field(discriminator="kind")] = GridSearch()
    seeds: list[int] | None = Field(None, min_length=1)
    evaluations: list[Evaluation] = Field(min_length=1)
    baseline: bool = True
    resources: Resources = Resources()

    @field_validator("base", mode="before")
    @classmethod
    def _is_a_recipe(cls, base: Any) -> Any:
        if not isinstance(base, str | dict):
            raise ValueError("name a gallery recipe or a recipe file, or write a recipe's keys")
        return base

    @field_validator("search", mode="before")
    @classmethod
    def _has_a_kind(cls, search: Any) -> Any:
        kinds = ("grid", "list", "random")
        if isinstance(search, dict) and search.get("kind") not in kinds:
            raise ValueError(f"name its 'kind', one of {', '.join(kinds)}")
        return search

    @model_validator(mode="after")
    def _check(self) -> Study:
        listed = [key for run in self.search.runs for key in run] if isinstance(self.search, ListSearch) else []
        if listed and self.axes:
            raise ValueError("search.runs already lists the runs; remove 'axes' or 'search'")
        for key in [*(axis.key for axis in self.axes), *listed]:
            if key.partition(".")[0] == "output":
                raise ValueError("'output' cannot be an axis, since each run has its own folder; remove it")
            if key == "seed" and self.seeds:
                raise ValueError("'seeds' already varies 'seed'; remove one of the two")
        if len(set(self.evaluations)) < len(self.evaluations):
            raise ValueError("two evaluations are the same; remove one")
        return self


@dataclass(frozen=True)
class StudyPoint:
    """One point of a study: a recipe and the axis values that led to it.

    Attributes:
        values: Labels of the axis values, by recipe key, as tables show them.
        recipe: Keys and values of the recipe, not validated yet.
    """

    values: dict[str, Any]
    recipe: dict[str, Any]


def load_study(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Study:
    """Load a study from a YAML file or a mapping.

    Args:
        source: YAML file, or the keys and values of a study.
        overrides: Assignments `key.path=value` to apply before validation.

    Returns:
        The validated study.

    Raises:
        ValueError: The file or a key is invalid; one line that names the key and the fix.
    """
    if isinstance(source, dict):
        data = copy.deepcopy(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"no study '{source}'; check the path")
        data = parse_yaml(path.read_bytes(), f"{path} is not valid YAML")
        if not isinstance(data, dict):
            raise ValueError(f"{path} is not a study; write a 'base' and 'axes'")
    for override in overrides:
        apply_override(data, override)
    try:
        return Study.model_validate(data)
    except ValidationError as e:
        raise ValueError(explain_error(e, "study", _keys)) from e


def points(study: Study) -> Iterator[StudyPoint]:
    """Iterate over the points of a study, in the order of its axes; the last axis varies fastest, then the seeds.

    Args:
        study: The study.

    Yields:
        The points that `study.search` selects.

    Raises:
        ValueError: The base recipe cannot be read, or an axis names a path that does not exist in the recipe.
    """
    base = copy.deepcopy(study.base) if isinstance(study.base, dict) else read_recipe(study.base)
    if study.model:
        base["model"] = study.model
    start = StudyPoint({}, base)
    seeds = [StudyAxis(key="seed", values=list(study.seeds))] if study.seeds else []
    for point in _search(study, start):
        yield from _vary(point, seeds)


def _search(study: Study, start: StudyPoint) -> Iterator[StudyPoint]:
    match study.search:
        case GridSearch():
            yield from _vary(start, study.axes)
        case ListSearch(runs=runs):
            for run in runs:
                yield from _vary(start, [StudyAxis(key=k, values=[v]) for k, v in run.items()])
        case RandomSearch(n=n, seed=seed):
            first = list(islice(_vary(start, study.axes), n + 1))
            yield from first if len(first) <= n else _draw(start, study.axes, n, random.Random(seed))


def _draw(start: StudyPoint, axes: Sequence[StudyAxis], n: int, generator: random.Random) -> Iterator[StudyPoint]:
    keys: set[str] = set()
    while len(keys) < n:
        (point,) = _vary(start, axes, lambda choices: [generator.choice(choices)])
        key = json.dumps([point.values, point.recipe], sort_keys=True, default=str)
        if key not in keys:
            keys.add(key)
            yield point


Choices = list[tuple[Any, Any]]


def _vary(
    point: StudyPoint,
    axes: Sequence[StudyAxis],
    pick: Callable[[Choices], Iterable[tuple[Any, Any]]] = lambda choices: choices,
) -> Iterator[StudyPoint]:
    if not axes:
        yield point
        return
    axis, *rest = axes
    if not axis.applies(point.recipe):
        yield from _vary(point, rest, pick)
        return
    if axis.key in point.values:
        raise ValueError(
            f"two axes vary {axis.key} of one recipe; merge them, or give them a 'when' that excludes the other"
        )
    for label, value in pick(axis.choices):
        recipe = copy.deepcopy(point.recipe)
        try:
            set_path(recipe, axis.key, copy.deepcopy(value))
        except ValueError as e:
            raise ValueError(f"axis {e}") from e
        yield from _vary(StudyPoint(point.values | {axis.key: label}, recipe), rest, pick)


def _value_at(recipe: Any, key: str) -> Any:
    """Return the value at a dotted path, or None where the recipe has none."""
    for part in key.split("."):
        if isinstance(recipe, Mapping):
            recipe = recipe.get(part)
        elif isinstance(recipe, list) and part.isdecimal() and int(part) < len(recipe):
            recipe = recipe[int(part)]
        else:
            return None
    return recipe


def _label(value: Any) -> Any:
    """Return a scalar unchanged, and any other value as one line of JSON."""
    return value if value is None or isinstance(value, Scalar) else json.dumps(value, default=str)


def _keys(loc: Location) -> list[str]:
    """Return the valid keys at a location of a validation error."""
    models: dict[Any, type[BaseModel]] = {
        "evaluations": Evaluation,
        "axes": StudyAxis,
        "resources": Resources,
        "grid": GridSearch,
        "list": ListSearch,
        "random": RandomSearch,
    }
    model = next((models[part] for part in reversed(loc[:-1]) if part in models), Study)
    return list(model.model_fields)
