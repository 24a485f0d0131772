"""The public names of the package: listed, documented, and the same as the command line."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic as library
from commands import Laconic
from tiny import make_recipe

RTN = {"method": "rtn", "scheme": "W8A16"}


def test_public_names_are_listed_and_documented() -> None:
    assert dir(library) == sorted(library.__all__)
    assert library.__version__ == version("laconic")
    assert (Path(library.__file__).parent / "py.typed").is_file()
    for name in set(library.__all__) - {"__version__"}:
        value = getattr(library, name)
        if callable(value):
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="module 'laconic' has no attribute 'compres'"):
        _ = library.compres


def test_a_plan_is_what_a_dry_run_prints(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    arguments = ("compress", llama, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
    plan = library.plan(str(llama), recipe, tmp_path / "out")
    assert plan.to_dict() == json.loads(laconic(*arguments, "--json").out)
    assert str(plan).split() == laconic(*arguments).out.split()
    assert [str(stage) for step in plan.steps for stage in step.stages] == ["rtn on 14 linears"]
    assert not (tmp_path / "out").exists()


def test_methods_and_gallery_are_what_ls_lists(laconic: Laconic) -> None:
    tables = json.loads(laconic("ls", "--json").out)
    assert [row["name"] for row in tables["methods"]] == [m.model_fields["method"].default for m in library.METHODS]
    assert [row["name"] for row in tables["recipes"]] == [*library.gallery()]


@pytest.mark.parametrize("dtype", ["float16", torch.int8], ids=str)
def test_a_dtype_that_is_none_is_told(dtype: Any, llama: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype should be a floating-point dtype of torch, such as torch\.bfloat16"):
        library.load(llama, dtype=dtype)
