"""The file that describes a study, and the points that it asks for: a base recipe, axes that vary its keys, what is
measured of each artifact."""

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
from laconic.recipe import Loc, explain, parse, put, read_recipe, set_by

Plain = str | int | float | bool


class Evaluation(Config):
    """What `laconic eval` takes: a text, tokens a window, how many windows, the dtype to compute in. chunk: read
    through the artifact's own key-value cache, so many tokens at a time, as `laconic eval --suite long` does; without
    it a window is read at once, and what a cache stores is not looked at. generate: how many openings of the text the
    artifact continues, and the original where it is measured."""

    text: str = "wikitext2"
    context_length: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=1)
    chunk: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    generate: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if self.generate and self.chunk:
            raise ValueError("'generate' goes with a text that is read at once; leave out 'chunk', or 'generate'")
        return self


class Axis(Config):
    """key: of the recipe, by its dotted path; `stages` for whole lists of them. values: a list, or a mapping of names,
    which tables show, to values. when: keys and the value, or one of the values, that they must be written with in the
    recipe as the base and the axes before this one leave it; elsewhere the key stays as it is."""

    key: str = Field(min_length=1)
    values: list[Any] | dict[Plain, Any] = Field(min_length=1)
    when: dict[str, Any] = Field(default_factory=dict)

    @field_validator("values", mode="before")
    @classmethod
    def _are_choices(cls, values: Any) -> Any:
        named = isinstance(values, dict) and all(isinstance(name, Plain) for name in values)
        if not named and not isinstance(values, list):
            raise ValueError("write a list, as in [32, 64], or a mapping of names to values")
        return values

    @property
    def choices(self) -> list[tuple[Any, Any]]:
        """(what tables show, value)"""
        if isinstance(self.values, dict):
            return list(self.values.items())
        return [(_shown(v), v) for v in self.values]

    def applies(self, recipe: Mapping[str, Any]) -> bool:
        """Whether a recipe is one that this axis varies."""
        return all(_at(recipe, key) in (v if isinstance(v, list) else [v]) for key, v in self.when.items())


class Grid(Config):
    """Every value of an axis with every value of the others."""

    kind: Literal["grid"] = "grid"


class Listed(Config):
    """The runs one by one: each a mapping of keys to values."""

    kind: Literal["list"] = "list"
    runs: list[dict[str, Any]] = Field(min_length=1)


class Random(Config):
    """n different points of the grid, drawn axis by axis; all of them where the grid has no more."""

    kind: Literal["random"] = "random"
    n: int = Field(ge=1)
    seed: int = 0


class Resources(Config):
    """What a run takes: processor cores, and GPUs or a share of one. Without cpus it has all cores of a machine;
    without gpus, one where there are any."""

    cpus: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)


class Study(Config):
    """base: a gallery name, a recipe file, or a recipe. model: in place of the base's. seeds: every point once with
    each. baseline: whether artifacts are compared with the original model."""

    base: str | dict[str, Any]
    model: str | None = None
    axes: list[Axis] = Field(default_factory=list)
    search: Annotated[Grid | Listed | Random, Field(discriminator="kind")] = Grid()
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
    def _is_of_a_kind(cls, search: Any) -> Any:
        kinds = ("grid", "list", "random")
        if isinstance(search, dict) and search.get("kind") not in kinds:
            raise ValueError(f"name its 'kind', one of {', '.join(kinds)}")
        return search

    @model_validator(mode="after")
    def _check(self) -> Study:
        listed = [key for run in self.search.runs for key in run] if isinstance(self.search, Listed) else []
        if listed and self.axes:
            raise ValueError("search.runs lists the runs one by one; leave out 'axes', or search")
        for key in [*(axis.key for axis in self.axes), *listed]:
            if key.partition(".")[0] == "output":
                raise ValueError("'output' cannot be varied: each run has a folder of its own")
            if key == "seed" and self.seeds:
                raise ValueError("'seed' is varied by 'seeds'; leave out one of the two")
        if len(set(self.evaluations)) < len(self.evaluations):
            raise ValueError("two evaluations are the same; leave out one")
        return self


@dataclass(frozen=True)
class Point:
    """values: what the axes chose, by key, as tables show it. recipe: its keys, not validated yet."""

    values: dict[str, Any]
    recipe: dict[str, Any]


def load_study(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Study:
    """A study from a YAML file or a mapping, with `key.path=value` overrides.

    Raises: ValueError, one line that names the key and the fix.
    """
    if isinstance(source, dict):
        data = copy.deepcopy(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"no study '{source}'; check the path")
        data = parse(path.read_bytes(), f"{path} is not valid YAML")
        if not isinstance(data, dict):
            raise ValueError(f"{path} is no study: it needs a 'base' and 'axes'")
    for override in overrides:
        set_by(data, override)
    try:
        return Study.model_validate(data)
    except ValidationError as e:
        raise ValueError(explain(e, "study", _keys)) from e


def points(study: Study) -> Iterator[Point]:
    """The points of a study, in the order of its axes, the last of which turns fastest; seeds after them all.

    Raises: ValueError when an axis leads nowhere in the recipe.
    """
    base = copy.deepcopy(study.base) if isinstance(study.base, dict) else read_recipe(study.base)
    if study.model:
        base["model"] = study.model
    start = Point({}, base)
    seeds = [Axis(key="seed", values=list(study.seeds))] if study.seeds else []
    for point in _searched(study, start):
        yield from _walk(point, seeds, lambda choices: choices)


def _searched(study: Study, start: Point) -> Iterator[Point]:
    match study.search:
        case Grid():
            yield from _walk(start, study.axes, lambda choices: choices)
        case Listed(runs=runs):
            for run in runs:
                yield from _walk(start, [Axis(key=k, values=[v]) for k, v in run.items()], lambda choices: choices)
        case Random(n=n, seed=seed):
            first = list(islice(_walk(start, study.axes, lambda choices: choices), n + 1))
            yield from first if len(first) <= n else _drawn(start, study.axes, n, random.Random(seed))


def _drawn(start: Point, axes: Sequence[Axis], n: int, chance: random.Random) -> Iterator[Point]:
    seen: set[str] = set()
    while len(seen) < n:
        (point,) = _walk(start, axes, lambda choices: [chance.choice(choices)])
        key = json.dumps([point.values, point.recipe], sort_keys=True, default=str)
        if key not in seen:
            seen.add(key)
            yield point


Choices = list[tuple[Any, Any]]


def _walk(point: Point, axes: Sequence[Axis], pick: Callable[[Choices], Iterable[tuple[Any, Any]]]) -> Iterator[Point]:
    if not axes:
        yield point
        return
    axis, *rest = axes
    if not axis.applies(point.recipe):
        yield from _walk(point, rest, pick)
        return
    if axis.key in point.values:
        raise ValueError(
            f"two axes vary {axis.key} of one recipe; make them one, or have their 'when' apply to different recipes"
        )
    for shown, value in pick(axis.choices):
        recipe = copy.deepcopy(point.recipe)
        try:
            put(recipe, axis.key, copy.deepcopy(value))
        except ValueError as e:
            raise ValueError(f"axis {e}") from e
        yield from _walk(Point(point.values | {axis.key: shown}, recipe), rest, pick)


def _at(recipe: Any, key: str) -> Any:
    """The value at a dotted path, None where none is written."""
    for part in key.split("."):
        if isinstance(recipe, Mapping):
            recipe = recipe.get(part)
        elif isinstance(recipe, list) and part.isdecimal() and int(part) < len(recipe):
            recipe = recipe[int(part)]
        else:
            return None
    return recipe


def _shown(value: Any) -> Any:
    """Plain values as they are, others in one line."""
    return value if value is None or isinstance(value, Plain) else json.dumps(value, default=str)


def _keys(loc: Loc) -> list[str]:
    inside: dict[Any, type[BaseModel]] = {
        "evaluations": Evaluation,
        "axes": Axis,
        "resources": Resources,
        "grid": Grid,
        "list": Listed,
        "random": Random,
    }
    model = next((inside[part] for part in reversed(loc[:-1]) if part in inside), Study)
    return list(model.model_fields)
