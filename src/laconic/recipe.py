"""A recipe: model, calibration, ordered stages, output. Read, varied, validated; it holds no code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from difflib import get_close_matches
from functools import reduce
from importlib.resources import files
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from laconic.config import Config
from laconic.methods import METHODS
from laconic.stages.stage import Stage

# Where in a mapping something is.
Loc = tuple[int | str, ...]
AnyStage: Any = Annotated[reduce(or_, METHODS), Field(discriminator="method")]


class Calibration(Config):
    """dataset: a Hub name, or a .txt, .jsonl or .parquet file. batch_size: samples run at once. max_memory_gb:
    activations beyond this many 10^9 bytes go to a file (a quarter of free memory when not given).
    moe_calibrate_all_experts: show experts every token, not only those that are routed to them. license, source,
    domain: for the data card, which cannot always know them."""

    dataset: str
    config: str | None = None
    split: str = "train"
    num_calibration_samples: int = Field(128, ge=1)
    max_seq_length: int = Field(2048, ge=2)
    batch_size: int | None = Field(None, ge=1)
    max_memory_gb: float | None = Field(None, gt=0)
    moe_calibrate_all_experts: bool = False
    license: str | None = None
    source: str | None = None
    domain: str | None = None


class Recipe(Config):
    """model and output may be left to the command line. seed: of every random choice."""

    model: str | None = None
    calibration: Calibration | None = None
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    output: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a gallery name, a YAML file, or a mapping, with `key.path=value` overrides.

    Raises: ValueError, one line that names the key and the fix.
    """
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    data = copy.deepcopy(source) if isinstance(source, dict) else read_recipe(source)
    for override in overrides or ():
        set_by(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise ValueError(explain(e)) from e


def gallery() -> dict[str, Path]:
    """The ready recipes, by name."""
    folder = Path(str(files("laconic"))) / "recipes"
    return {f.stem: f for f in sorted(folder.glob("*.yaml"))}


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The keys of a gallery recipe or of a file, as they are written there. Raises: ValueError when there are none."""
    source = str(source)
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe file '{source}'; check the path, or name one of: {', '.join(gallery())}")
    else:
        ready = gallery()
        if source not in ready:
            near = get_close_matches(source, ready, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"the gallery has {', '.join(ready)}"
            raise ValueError(f"no recipe '{source}'; {hint}")
        path = ready[source]
    data = parse(path.read_bytes(), f"{path} is not valid YAML")
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a recipe: it needs a list of 'stages'")
    return data


def parse(text: str | bytes, otherwise: str) -> Any:
    """What a YAML text says. otherwise: what to say of it when it says nothing. Raises: ValueError."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        where = f" in line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ValueError(f"{otherwise}{where}: {e.problem}") from e
    except RecursionError as e:
        raise ValueError(f"{otherwise}: it is nested too deeply") from e
    except yaml.reader.ReaderError as e:
        raise ValueError(f"{otherwise}: it is no text, but holds a character that no text has") from e
    except ValueError as e:  # an impossible date, for instance
        raise ValueError(f"{otherwise}: {e}") from e
    except Exception as e:  # what the parser trips over when a value is not of the kind that its tag says
        raise ValueError(f"{otherwise}: a tag does not fit its value") from e


def set_by(data: dict[str, Any], override: str) -> None:
    """Vary a key in place, as `key.path=value` says, the value in YAML. Raises: ValueError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: write it as key.path=value, for instance stages.0.group_size=32")
    parsed = parse(value, f"--set {key}: '{_short(value)}' is not a YAML value")
    try:
        put(data, key, parsed)
    except ValueError as e:
        raise ValueError(f"--set {e}") from e


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted path in place. Raises: ValueError when the path goes through what holds no keys."""
    *path, last = key.split(".")
    here: Any = data
    for part in path:
        if isinstance(here, list):
            here = _item(here, part, key)
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, dict | list):
            raise ValueError(f"{key}: '{part}' holds a plain value, not keys")
    if isinstance(here, list):
        _item(here, last, key)
        here[int(last)] = value
    else:
        here[last] = value


def _item(items: list[Any], part: str, key: str) -> Any:
    if not part.isdecimal() or int(part) >= len(items):
        raise ValueError(f"{key}: '{part}' is no position in a list of {len(items)} (they count from 0)")
    return items[int(part)]


def explain(error: ValidationError, noun: str = "recipe", keys: Callable[[Loc], list[str]] | None = None) -> str:
    """The first problem in one line, with a suggestion where a name was mistyped. noun: what was read. keys: those that
    are known where a location leads; a recipe's own by default."""
    # Where an item of a list is wrong, pydantic says of the list too that it is too short.
    problems = [p for p in error.errors(include_url=False) if not (p["type"] == "too_short" and p["input"])]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _describe(problems[0], noun, keys or _keys) + more


def _describe(problem: ErrorDetails, noun: str, keys: Callable[[Loc], list[str]]) -> str:
    # A stage's location has its method's tag in it, which the user did not write.
    tags = sorted(m.model_fields["method"].default for m in METHODS)
    where = [str(p) for i, p in enumerate(problem["loc"]) if not (i == 2 and p in tags)]
    path, given = ".".join(where), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{path}'{_suggest(where[-1], keys(problem['loc']))}"
        case "union_tag_invalid":
            method = given["method"]
            if not isinstance(method, str):
                return f"{path}.method should be the name of a method, one of {', '.join(tags)}"
            return f"unknown method '{_short(method)}' in {path}{_suggest(method, tags)}"
        case "union_tag_not_found":
            return f"{path} names no method: add 'method: NAME', one of {', '.join(tags)}"
        case "missing":
            return f"the {noun} lacks '{path}'"
        case "value_error":
            return f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        case "too_short":
            return f"{path} should have at least one item"
        case "tuple_type":
            return f"{path} should be a list"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            return f"{path} should hold keys and values"
        case "invalid_key":
            return f"{path}: a key should be a word"
        case "string_type" if where[-1] == "[key]":
            return f"{'.'.join(where[:-2])}: a key should be a word, not {_short(str(given))}"
        case kind:
            rule = problem["msg"].replace("Input should", "should")
            # What pydantic could make nothing of, it also says how.
            rule = rule.partition(",")[0] if kind.endswith(("_parsing", "_from_float")) else rule
            plain = isinstance(given, str | int | float | None)
            return f"{path} {rule}" + (f", not {_short(yaml.safe_dump(given).splitlines()[0])}" if plain else "")


def _keys(loc: Loc) -> list[str]:
    model: type[BaseModel] = Recipe
    if loc[0] == "calibration" and len(loc) > 1:
        model = Calibration
    elif loc[0] == "stages" and len(loc) > 2:
        model = next((m for m in METHODS if m.model_fields["method"].default == loc[2]), Stage)
        for part in loc[3:-1]:
            model = _inside(model, part) or model
    return list(model.model_fields)


def _inside(model: type[BaseModel], key: int | str) -> type[BaseModel] | None:
    """The model of what a key of another holds, or of the items of the list there."""
    field = model.model_fields.get(str(key))
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _suggest(given: str, known: list[str]) -> str:
    near = get_close_matches(given, known, 1)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
