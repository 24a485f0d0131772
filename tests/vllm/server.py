"""Asks real vLLM, in a process of its own environment that serves one model after another."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LACONIC_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    # Without this, machines with AMX run W4A16 as W4A8 and say nothing.
    "VLLM_CPU_INT4_W4A8": "0",
    "OMP_NUM_THREADS": "1",
}
LONGEST = 900

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="no vLLM environment: run `make test-vllm`"),
]


class Server:
    """A process that runs jobs, see `serve.py`."""

    def __init__(self) -> None:
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115
        reading, writing = os.pipe()
        with open(self.log.name, "w") as log:
            self.process = subprocess.Popen(
                [PYTHON, str(Path(__file__).with_name("serve.py")), str(writing)],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self.results = os.fdopen(reading)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        until = time.monotonic() + LONGEST
        while not select.select([self.results], [], [], 1)[0]:
            if not self.alive or time.monotonic() > until:
                self.stop()
                raise AssertionError(f"vLLM ended or took too long:\n{Path(self.log.name).read_text()[-4000:]}")
        result: dict[str, Any] = json.loads(self.results.readline() or '{"error": "vLLM ended"}')
        if "error" in result:
            result["error"] += f"\n{Path(self.log.name).read_text()[-4000:]}"
        return result

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


_servers: list[Server] = []


@atexit.register
def _stop_all() -> None:
    for server in _servers:
        server.stop()


def run(*jobs: dict[str, Any], alone: bool = False) -> list[dict[str, Any]]:
    """What vLLM made of jobs. alone: in a process in which nothing else has been or will be served."""
    if alone:
        server = Server()
        try:
            return [server.run(job) for job in jobs]
        finally:
            server.stop()
    if not _servers or not _servers[-1].alive:
        _servers.append(Server())
    return [_servers[-1].run(job) for job in jobs]


def job(
    folder: Path,
    rounds: list[list[list[int]]],
    sampling: dict[str, Any] | None = None,
    *,
    times: int = 1,
    emulate: bool = False,
    adapter: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """For `run`: a model, and rounds of prompts. options: of vllm.LLM."""
    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False} | options
    return {
        "options": {"model": str(folder), **options},
        "rounds": rounds,
        "sampling": {"max_tokens": 8, "logprobs": 1, "prompt_logprobs": 1} if sampling is None else sampling,
        "times": times,
        "emulate": emulate,
        "adapter": adapter and str(adapter),
    }
