"""What a result says of how it was made."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from artifacts import press, rtn
from commands import Laconic
from laconic.artifact.artifact import Artifact
from laconic.pipeline.provenance import command_line

KIVI = "{method: kivi, k_bits: 4, v_bits: 4, group_size: 16}"
SHORT = ("--context-length", "32", "--windows", "2")


@pytest.fixture(scope="module")
def texts(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose name a shell would take apart, and a task."""
    folder = tmp_path_factory.mktemp("it's $HOME") / "two words"
    folder.mkdir()
    (folder / "a; b*.txt").write_text(text.read_text())
    (folder / "piqa.jsonl").write_text(json.dumps({"question": "abc", "choices": ["d", "e"], "label": 0}))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "text", "MADE", "--text", "TEXTS/a; b*.txt", *SHORT, "--generate", "1"),
        ("eval", "domains", "MADE", "a b=TEXTS/a; b*.txt", *SHORT),
        ("eval", "long", "MADE", "--measure", "memory", "--lengths", "64", "--kv", KIVI),
        ("bench", "sparsity", "LLAMA", "MADE", "--measure", "models", "--prompt", "8", "--rounds", "3"),
        pytest.param(
            ("eval", "tasks", "MADE", "piqa", "--data", "TEXTS"),
            marks=pytest.mark.skipif(
                importlib.util.find_spec("lm_eval") is None,
                reason="lm-eval is not installed: pip install 'laconic[eval]'",
            ),
        ),
    ],
    ids=lambda arguments: " ".join(a for a in arguments if a.isalpha() or a.startswith("--")),
)
def test_a_shell_takes_a_kept_command_as_it_was_typed(
    laconic: Laconic, llama: Path, texts: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    made = press(llama, tmp_path / "an artifact", rtn("W8A16")).path
    places = {"MADE": str(made), "TEXTS": str(texts), "LLAMA": str(llama)}
    typed = [re.sub("MADE|TEXTS|LLAMA", lambda found: places[found[0]], a) for a in arguments]
    ran = laconic(*typed)
    assert ran.code == 0, ran.err
    kept = {name: result["command"] for name, result in Artifact(made).results.items() if name != "compress"}
    assert kept
    for command in kept.values():
        assert read_by_a_shell(command) == ["laconic", *typed]


def test_so_it_is_of_compress(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "a recipe.yaml"
    recipe.write_text("stages: [{method: rtn, scheme: W8A16}]")
    typed: list[Any] = ["compress", llama, "--recipe", recipe, "--output", tmp_path / "it's made"]
    typed += ["--set", "stages.0={method: rtn, scheme: W4A16, group_size: 32}"]
    assert laconic(*typed).code == 0
    command = Artifact(tmp_path / "it's made").results["compress"]["command"]
    assert read_by_a_shell(command) == ["laconic", *map(str, typed)]
    # What needs no quotes has none.
    assert shlex.quote(str(llama)) in command.split()


def read_by_a_shell(command: str) -> list[str]:
    said = subprocess.run(
        ["sh", "-c", f"laconic() {{ printf '%s\\0' laconic \"$@\"; }}\n{command}"], capture_output=True, check=True
    )
    return said.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [("/usr/local/bin/laconic", "laconic ls"), ("laconic", "laconic ls"), ("a b/study.py", "'a b/study.py' ls")],
)
def test_the_command_is_kept_without_the_folder_it_lies_in(
    typed: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "ls"])
    assert command_line() == kept
