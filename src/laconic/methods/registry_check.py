"""Check that method classes fulfil the contract of stages, when the registry is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from laconic.stages.block import BlockStage
from laconic.stages.linear import WeightStage
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs, Stage, example_of


def check_methods(kinds: Iterable[Any]) -> None:
    """Check the registry.

    Args:
        kinds: the stage classes.

    Raises:
        TypeError: for the first class that lacks something; the message names the class, its file and what it lacks.
    """
    names: dict[str, type[Stage]] = {}
    for kind in kinds:
        for problem in _problems(kind):
            raise TypeError(f"{_where(kind)}: {problem}")
        name = kind.model_fields["method"].default
        if name in names:
            raise TypeError(f"{_where(kind)}: method '{name}' is {names[name].__name__}'s already; choose another name")
        names[name] = kind


def _problems(kind: Any) -> Iterable[str]:
    if not isinstance(kind, type):
        yield f"{kind!r} is no class; put the class of a method into METHODS"
        return
    if not issubclass(kind, Stage):
        yield f"{kind.__name__} is no stage; derive it from a class of laconic.stages"
        return
    field = kind.model_fields["method"]
    if not isinstance(field.default, str) or get_args(field.annotation) != (field.default,):
        yield f'{kind.__name__} lacks a name: add `method: Literal["foo"] = "foo"`'
    if not hasattr(kind, "scope"):
        yield f"{kind.__name__} lacks a scope; derive it from LinearStage, BlockStage, ModelStage or CacheStage"
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        yield f"{kind.__name__} lacks {', '.join(f'{name}()' for name in missing)}"
    if not (inspect.getmodule(kind) or kind).__doc__:
        yield f"{kind.__name__}'s module lacks a docstring, whose first line `laconic ls` shows"
    if not vars(kind).get("__doc__"):
        yield f"{kind.__name__} lacks a docstring"
    for name, parameters in _contract(kind).items():
        if not _takes(getattr(kind, name), parameters):
            yield f"{kind.__name__}.{name}() has other parameters than its base: write {name}({', '.join(parameters)})"
    try:
        example = kind.model_validate(example_of(kind, "text.txt"))
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"]))
        yield f"{kind.__name__}.example is no valid instance ({where}: {error['msg']})"
        return
    try:
        needs = example.needs
    except TypeError as e:
        yield f"{kind.__name__}.needs fails: {e}"
        return
    if not isinstance(needs, Needs):
        yield f"{kind.__name__}.needs is a {type(needs).__name__}; return a laconic.stages.stage.Needs"
        return
    if issubclass(kind, BlockStage) and not needs.activations:
        yield f"{kind.__name__}.needs lacks activations, which every block stage is given; begin with super().needs"
    if needs.survey and not isinstance(example, WeightStage):
        yield f"{kind.__name__}.needs declares survey, which stages that treat weights are given; derive it from one"
    elif isinstance(example, WeightStage) and needs.survey and type(example).survey is WeightStage.survey:
        yield f"{kind.__name__}.needs declares survey; implement survey(self, block), or leave it out"
    if isinstance(example, WeightStage) and example.quantizes and not isinstance(example, QuantizingStage):
        yield f"{kind.__name__} quantizes, and proposes no scheme; derive it from QuantizingStage"


def _contract(kind: type[Stage]) -> dict[str, list[str]]:
    """Return the parameters of each function that the bases of a class leave to it, by the function's name."""
    functions = {
        name: vars(base)[name]
        for base in kind.__mro__
        for name in getattr(base, "__abstractmethods__", ())
        if name in vars(base)
    }
    return {name: list(inspect.signature(function).parameters) for name, function in functions.items()}


def _takes(function: Any, parameters: list[str]) -> bool:
    """Return whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError:
        return False
    return True


def _where(kind: Any) -> str:
    module = inspect.getmodule(kind)
    file = getattr(module, "__file__", None)
    return f"methods/{Path(file).name}" if file else getattr(kind, "__module__", "methods")
