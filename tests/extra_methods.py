"""Methods that recipes know for the length of a test."""

from __future__ import annotations

from typing import Any

import pytest

import laconic.pipeline.compression as compression
from laconic.recipe import Recipe, load_recipe
from laconic.stages.stage import Stage, method_name

_STAND_IN = {"method": "rtn", "scheme": "W8A16"}


def allow_methods(monkeypatch: pytest.MonkeyPatch, *kinds: type[Stage]) -> None:
    """Let recipes (as mappings) name these methods too."""
    by_name = {method_name(kind): kind for kind in kinds}

    def read(source: Any, overrides: Any = None) -> Recipe:
        stages = source["stages"]
        known = [_STAND_IN if s["method"] in by_name else s for s in stages]
        recipe = load_recipe({**source, "stages": known}, overrides)
        built = [
            by_name[s["method"]].model_validate(s) if s["method"] in by_name else parsed
            for s, parsed in zip(stages, recipe.stages, strict=True)
        ]
        return recipe.model_copy(update={"stages": tuple(built)})

    monkeypatch.setattr(compression, "load_recipe", read)
