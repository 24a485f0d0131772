"""The format of CONTRIBUTING works as it stands there; `test_methods` runs its method."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import logits, original, quantized_linears, recipe, with_decoded_weights
from documented import code_block
from laconic.formats.schemes import PRESETS, Scheme
from laconic.formats.tiling import Tiling


@pytest.fixture
def ternary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme TERNARY, of the format that the page defines."""
    file = tmp_path / "ternary.py"
    file.write_text(code_block("CONTRIBUTING.md", "## Add a format"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(PRESETS, "TERNARY", Scheme("TERNARY", module.Ternary(Tiling("group", 128)), engine="laconic"))


@pytest.mark.usefixtures("ternary")
@pytest.mark.parametrize("keys", [{"method": "rtn", "observer": "mse"}, {"method": "gptq"}], ids=str)
def test_the_format_of_contributing_works_as_it_stands(
    keys: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    stage = keys | {"scheme": "TERNARY", "group_size": 32}
    artifact = laconic.compress(str(llama), recipe(stage, text=text), tmp_path / "out")
    model = laconic.load(artifact.path)
    linears = quantized_linears(model)
    assert len(linears) == 14
    for linear in linears.values():
        groups = linear.decode(torch.float32).reshape(-1, 32)
        assert all(len(group.abs().unique()) <= 2 for group in groups)
    expected = logits(with_decoded_weights(llama, artifact.path))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(original(artifact.path)), expected)
