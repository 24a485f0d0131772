"""Catalogue of methods, schemes and recipes, read from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from laconic.formats.schemes import PRESETS, Scheme
from laconic.formats.support import tried_in
from laconic.methods import METHODS
from laconic.recipe import gallery, read_recipe
from laconic.stages.stage import Stage, method_name

# Words of recipes for the types of options.
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Return the tables of methods, schemes and recipes, as rows of text by column."""
    return {
        "methods": [
            {
                "name": m.model_fields["method"].default,
                "scope": m.scope,
                "about": _first_line(inspect.getmodule(m)),
            }
            for m in METHODS
        ],
        "schemes": [
            {
                "name": s.name,
                "weights": _weights(s),
                "activations": _activations(s),
                "tried in": tried_in(s.name),
            }
            for s in PRESETS.values()
        ],
        "recipes": [
            {"name": name, "about": file.read_text().splitlines()[0].removeprefix("# ")}
            for name, file in gallery().items()
        ],
    }


def describe(name: str) -> dict[str, Any]:
    """Return what is known of one method, scheme or recipe.

    Args:
        name: Its name, as `catalogue` lists it.

    Returns:
        `kind`, its row of the catalogue, and `options` of a method, or keys and text of a recipe.

    Raises:
        ValueError: There is none; the message has the nearest name.
    """
    rows = {(row["name"], table.removesuffix("s")): row for table, rows in catalogue().items() for row in rows}
    entry = next(((kind, row) for (known, kind), row in rows.items() if known == name), None)
    if entry is None:
        names = {known.lower(): known for known, _ in rows}
        near = get_close_matches(name.lower(), names, 1)
        hint = f"did you mean '{names[near[0]]}'?" if near else "'laconic ls' lists all of them"
        raise ValueError(f"no method, scheme or recipe '{name}'; {hint}")
    kind, row = entry
    described: dict[str, Any] = {"kind": kind, **row}
    if kind == "method":
        described["options"] = _options(next(m for m in METHODS if method_name(m) == name))
    elif kind == "recipe":
        described |= {"keys": read_recipe(name), "text": gallery()[name].read_text()}
    return described


def support_matrix() -> str:
    """Return the schemes as a Markdown table."""
    rows = catalogue()["schemes"]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(r.values()) + " |" for r in rows])


def _weights(scheme: Scheme) -> str:
    return f"{scheme.weights.title}, {scheme.weights.granularity}"


def _activations(scheme: Scheme) -> str:
    acts = scheme.input_activations
    if acts is None:
        return "16 bit"
    timing = {True: "dynamic", False: "static", "local": "dynamic in a static range"}[acts.dynamic]
    # Activations are always symmetric.
    return f"{acts.format.title}, {timing}, {acts.format.granularity.removeprefix('symmetric, ')}"


def _first_line(module: object) -> str:
    return (inspect.getdoc(module) or "").splitlines()[0]


def _options(method: type[Stage]) -> list[dict[str, Any]]:
    """Return the options of a method, in the order of their declaration."""
    about: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        about |= _attributes(vars(kind).get("__doc__") or "")
    return [
        {
            "name": name,
            "type": _type_words(field),
            "required": field.is_required(),
            "default": to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))
            if not field.is_required()
            else None,
            "about": about.get(name, ""),
        }
        for name, field in method.model_fields.items()
        if name != "method"
    ]


def _attributes(docstring: str) -> dict[str, str]:
    """Return the texts of the `Attributes:` section of a docstring, each on one line, by name."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    texts: dict[str, list[str]] = {}
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.fullmatch(r" {4}(\w+): (.*)", line):
            texts[match[1]] = [match[2]]
        elif texts and line:
            texts[next(reversed(texts))].append(line.strip())
    return {name: " ".join(lines) for name, lines in texts.items()}


def _type_words(field: FieldInfo) -> str:
    """Return the type of an option and its bounds, in the words of a recipe."""
    bounds = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in _BOUNDS.items() if hasattr(m, key)]
    words = _words_of(field.annotation)
    first = words.removesuffix(" | null")
    return " ".join([first, *bounds]) + words.removeprefix(first)


def _words_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words_of(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(_words_of(a) for a in arguments))
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, Mapping | BaseModel):
        return "mapping"
    return _TYPES.get(kind, "list")
