"""Check that method classes fulfil the contract of stages, when the registry is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from laconic.stages.stage import Stage, example_of


def check_methods(kinds: Iterable[type[Stage]]) -> None:
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


def _problems(kind: type[Stage]) -> Iterable[str]:
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
    try:
        kind.model_validate(example_of(kind, "text.txt"))
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"]))
        yield f"{kind.__name__}.example is no valid instance ({where}: {error['msg']})"


def _where(kind: type[Stage]) -> str:
    module = inspect.getmodule(kind)
    file = getattr(module, "__file__", None)
    return f"methods/{Path(file).name}" if file else kind.__module__
