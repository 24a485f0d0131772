"""scripts/artifact_hashes.py: the same code writes the same bytes, and a byte that differs is reported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "artifact_hashes.py"
RECIPES = ("rtn-w8a8/llama", "gptq-w4a16/llama")
pytestmark = pytest.mark.slow


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_hashes_are_equal_until_a_byte_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = load()

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    def compare(before: str, after: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            call("compare", tmp_path / before, tmp_path / after)
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().out

    only = [argument for recipe in RECIPES for argument in ("--only", recipe)]
    for name in ("before", "after"):
        assert call("write", tmp_path / name, *only).count(": ok") == len(RECIPES)
    assert compare("before", "after") == (0, "2 artifacts (0 refused), 0 different\n")

    compress = script.laconic.compress

    def damage(*arguments: Any, **options: Any) -> Any:
        artifact = compress(*arguments, **options)
        file = min(artifact.path.glob("*.safetensors"))
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return artifact

    monkeypatch.setattr(script.laconic, "compress", damage)
    call("write", tmp_path / "damaged", "--only", RECIPES[0])
    code, report = compare("before", "damaged")
    assert code == 1
    assert f"{RECIPES[0]}: model" in report
    assert "config.json" not in report
