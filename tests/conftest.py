"""What every test may lean on: a tiny model, a text to calibrate it with, and the command line in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from commands import Laconic, Ran

# No test reaches for the network, and tiny matrices are multiplied fastest by one thread. Both are read when torch and
# transformers are imported, which this file therefore leaves to the fixtures.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Many small cases, each on a machine that may be busy with something else.
settings.register_profile("laconic", max_examples=50, deadline=None)
settings.load_profile("laconic")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16. Not to be changed: a test that damages a model copies it."""
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text enough for 64 samples of 64 tokens."""
    from tiny import make_text

    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(make_text(6000))
    return file


@pytest.fixture
def laconic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Laconic:
    """Run `laconic ARGUMENTS` in this process."""
    from laconic.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["laconic", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return Ran(code, *capsys.readouterr())

    return run
