"""First steps that several runs have in common are computed once, and change nothing of what comes out."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

import laconic.pipeline.compression as compression
import laconic.sweep.runner as runner
from interruptions import Killed, contents
from laconic.pipeline.compression import compress
from laconic.sweep.runner import sweep
from laconic.sweep.study import load_study

DEPTH = {"method": "depth", "blocks": 1}
SCHEMES = ["W8A16", "W6A6"]


def stages(scheme: str) -> list[dict[str, Any]]:
    return [DEPTH, {"method": "rtn", "scheme": scheme}]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ray is not installed."""
    monkeypatch.setattr(runner, "_ray_installed", lambda: False)


@pytest.fixture
def asked(llama: Path, text: Path) -> dict[str, Any]:
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    return {
        "base": {"stages": stages(SCHEMES[0]), "calibration": calibration},
        "model": str(llama),
        "axes": [{"key": "stages.1.scheme", "values": SCHEMES}],
        "evaluations": [{"text": str(text), "context_length": 32, "windows": 2, "dtype": "float32"}],
        "baseline": False,
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the model stages that were worked, as they begin."""
    begun: list[str] = []
    real = compression.run_model_step

    def counted(pipeline: Any, step: Any, *more: Any, **keys: Any) -> Any:
        begun.append(step.stages[0].method)
        return real(pipeline, step, *more, **keys)

    monkeypatch.setattr(compression, "run_model_step", counted)
    return begun


def test_a_common_first_step_is_made_once(tmp_path: Path, asked: dict[str, Any], made: list[str]) -> None:
    rows = sweep(load_study(asked), tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["done", "done"]
    assert made == ["depth"]
    assert not (tmp_path / "sweep" / "steps").exists()
    for row, scheme in zip(rows, SCHEMES, strict=True):
        recipe = asked["base"] | {"stages": stages(scheme)}
        alone = compress(asked["model"], recipe, tmp_path / scheme)
        ours, theirs = contents(tmp_path / "sweep" / row["artifact"]), contents(alone.path)
        weights = [name for name in theirs if name.endswith(".safetensors")]
        assert weights
        assert all(ours[name] == theirs[name] for name in [*weights, "config.json"])


def test_another_first_step_is_another(tmp_path: Path, asked: dict[str, Any], made: list[str]) -> None:
    asked["axes"].append({"key": "calibration.num_calibration_samples", "values": [2, 4]})
    assert {row["status"] for row in sweep(load_study(asked), tmp_path)} == {"done"}
    assert made == ["depth", "depth"]


def test_a_killed_sweep_takes_the_step_that_is_there(
    tmp_path: Path, asked: dict[str, Any], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(event: Any) -> None:
        if event["event"] == "block":
            raise Killed

    with pytest.raises(Killed):
        sweep(load_study(asked), tmp_path, report=watch)
    assert made == ["depth"]
    rows = sweep(load_study(asked), tmp_path)
    assert [row["status"] for row in rows] == ["done", "done"]
    assert made == ["depth"]


def test_two_that_want_it_at_once_make_it_once(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compression.run_model_step

    def slow(*more: Any, **keys: Any) -> Any:
        with (tmp_path / "made").open("a") as file:
            file.write("depth\n")
        time.sleep(1)
        return real(*more, **keys)

    def work(scheme: str) -> None:
        recipe = asked["base"] | {"stages": stages(scheme)}
        compress(asked["model"], recipe, tmp_path / scheme, steps=tmp_path / "steps")

    monkeypatch.setattr(compression, "run_model_step", slow)
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(scheme,)) for scheme in SCHEMES]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all((tmp_path / scheme / "config.json").exists() for scheme in SCHEMES)
    assert (tmp_path / "made").read_text() == "depth\n"
