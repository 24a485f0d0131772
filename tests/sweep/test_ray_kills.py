"""A worker, the driver or a node that is killed loses at most the run in flight, and that one is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import laconic
import laconic.sweep.runner as runner
from laconic.sweep.runner import sweep
from laconic.sweep.study import load_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install 'laconic[ray]')"),
]
FIGURES = ("run", "status", "error", "perplexity", "kl_mean", "file_bytes")


@pytest.fixture(autouse=True)
def _workers_find_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is being tested here, workers import the same."""
    monkeypatch.setenv("PYTHONPATH", str(Path(laconic.__file__).parents[1]))


@pytest.fixture
def asked(llama: Path, text: Path) -> dict[str, Any]:
    """Three runs, one at a time, each long enough to be killed in its middle."""
    calibration = {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 32}
    tuned = {"method": "autoround", "scheme": "W4A16", "group_size": 32, "iters": 40}
    return {
        "base": {"stages": [tuned], "calibration": calibration},
        "model": str(llama),
        "axes": [{"key": "stages.0.scheme", "values": ["W4A16", "W3A16", "W2A16"]}],
        "evaluations": [{"text": str(text), "context_length": 32, "windows": 4, "dtype": "float32"}],
        "resources": {"cpus": 1, "gpus": 0},
    }


@pytest.fixture
def expected(asked: dict[str, Any], tmp_path: Path) -> list[list[Any]]:
    """What comes of the study in one process and without any kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_ray_installed", lambda: False)
        return figures(sweep(load_study(asked), tmp_path / "expected"))


def figures(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[name] for name in FIGURES] for row in rows]


def workers_at(run: str) -> Iterator[psutil.Process]:
    """Ray's workers of ours that are at a run: they hold its turn."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any(file.path.endswith(f"/locks/{run}.lock") for file in process.open_files()):
                yield process
        except psutil.Error:
            continue


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_is_killed(tmp_path: Path, asked: dict[str, Any], expected: list[list[Any]], times: int) -> None:
    out, second = tmp_path / "out", expected[1][0]
    killed: set[int] = set()

    def kill() -> None:
        """Each worker at the second run once, when a block of it is done."""
        wait_for(lambda: list(out.glob(f"runs/{second}.partial/*.safetensors")))
        while len(killed) < times and not (out / "results" / f"{second}.json").exists():
            for process in workers_at(second):
                if process.pid not in killed and len(killed) < times:
                    killed.add(process.pid)
                    process.kill()
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        rows = sweep(load_study(asked), out)
        killing.result()
    assert len(killed) == times
    if times == 1:
        assert figures(rows) == expected
        return
    # Twice is once too often: the run is remembered as failed, and only that one.
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[1]["error"].startswith("its worker died (")
    assert figures(sweep(load_study(asked), out)) == expected


def test_the_driver_is_killed(tmp_path: Path, asked: dict[str, Any], expected: list[list[Any]]) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-c", "from laconic.cli import main; main()", "sweep", str(file), "-o", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            wait_for(lambda: list(out.glob("results/*.json")) and list(out.glob("runs/*.partial/*.safetensors")))
        finally:
            os.kill(driver.pid, signal.SIGKILL)
    done = {f.stem: f.read_text() for f in out.glob("results/*.json")}
    assert done
    assert len(done) < 3
    begun: list[str] = []

    def watch(event: Any) -> None:
        if event["event"] == "run" and event["state"] == "started":
            begun.append(event["run"])

    assert figures(sweep(load_study(asked), out, report=watch)) == expected
    assert not done.keys() & set(begun)
    for run, said in done.items():
        assert (out / "results" / f"{run}.json").read_text() == said


def test_a_node_is_killed(tmp_path: Path, asked: dict[str, Any], expected: list[list[Any]]) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1)]
    second = expected[1][0]

    def watch(event: Any) -> None:
        if event["event"] == "block" and event["run"] == second and len(nodes) == 1:
            cluster.remove_node(nodes[0], allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))

    try:
        rows = sweep(load_study(asked), tmp_path / "out", address=cluster.address, report=watch)
    finally:
        cluster.shutdown()
    assert len(nodes) == 2
    assert figures(rows) == expected


def test_more_than_a_node_has_is_told(tmp_path: Path, asked: dict[str, Any]) -> None:
    asked["resources"] = {"cpus": 4096}
    with pytest.raises(ValueError, match="a run takes 4096 cores and 0 GPUs, and no node of this Ray has as many"):
        sweep(load_study(asked), tmp_path)
    assert not list(tmp_path.glob("results/*"))


def wait_for(what: Any, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
