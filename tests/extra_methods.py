"""Methods that recipes know for the length of a test."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any

import pytest
from pydantic import Field, create_model

import laconic.recipe as recipe
from laconic.stages.stage import Stage


def allow_methods(monkeypatch: pytest.MonkeyPatch, *kinds: type[Stage]) -> None:
    """Let recipes (as mappings or files) name these methods too."""
    methods: tuple[type[Stage], ...] = (*recipe.METHODS, *kinds)
    any_stage: Any = Annotated[reduce(or_, methods), Field(discriminator="method")]
    stages: Any = (tuple[any_stage, ...], Field(min_length=1))
    monkeypatch.setattr(recipe, "Recipe", create_model("Recipe", __base__=recipe.Recipe, stages=stages))
    monkeypatch.setattr(recipe, "METHODS", methods)
