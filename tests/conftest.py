"""What every test may lean on: a tiny model, a text to calibrate it with, and the command line in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from commands import Laconic, Ran

# No test reaches for the network, and tiny matrices are multiplied fastest by one thread. All is read when torch and
# transformers are imported, which this file therefore leaves to the fixtures.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test does use more, threads that wait leave the processor to the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Many small cases, each on a machine that may be busy with something else.
settings.register_profile("laconic", max_examples=50, deadline=None)
settings.load_profile("laconic")


@pytest.fixture(scope="session", autouse=True)
def _commands_built_once() -> Iterator[None]:
    """Typer builds every command anew each time one is run, which the tests do many hundred times."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> Iterator[None]:
    """No test outlives a loss of power: files are not flushed to the disk, which takes long on a busy one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what computes on a CUDA device where there is one; asked for by the mark alone, it needs one."""
    for item in items:
        if {"cuda", "on_triton"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("gpu")
    if config.getoption("markexpr") == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("torch finds no CUDA device; name a python that has one: make test-gpu PYTHON=...")


@pytest.fixture(scope="session")
def cuda() -> Any:
    """The device of a test that has nothing to show without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here: run `make test-gpu` where there is one")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def on_triton() -> Iterator[Callable[..., Any]]:
    """Call a function where Triton's kernels run: here on a GPU, and without one in a process whose Triton interprets.

    A process of its own, since Triton chooses its interpreter when it is first imported, and one for all tests, since
    most of its time is its start. Functions and arguments are pickled.
    """
    pytest.importorskip("triton", reason="Triton is not installed here")
    import torch

    if torch.cuda.is_available():
        yield lambda function, *given, **named: function(*given, **named)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as interpreter:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            interpreter.submit(int).result()
        yield lambda function, *given, **named: interpreter.submit(function, *given, **named).result()


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
