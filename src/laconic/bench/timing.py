"""Interleaved timing of calls, so that a disturbance of the machine affects all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

Call = Callable[[], object]

WARM_UP = 2
# Seconds of a round below which the clock's overhead matters; shorter calls are repeated.
_MIN_SECONDS = 2e-3


@dataclass(frozen=True)
class Times:
    """Times of a call.

    Attributes:
        rounds: Seconds of each round.
        cpu: Processor seconds of this process in each round, which other processes hardly change; empty on a GPU.
        graph: Whether a CUDA graph was replayed, so that kernel launches take no time.
    """

    rounds: tuple[float, ...]
    cpu: tuple[float, ...] = ()
    graph: bool = False

    @property
    def median(self) -> float:
        """Median seconds (the lower one of an even number)."""
        return self.percentile(0.5)

    @property
    def cpu_median(self) -> float:
        """Median processor seconds; median seconds where processor time was not measured."""
        return Times(self.cpu or self.rounds).median

    def percentile(self, share: float) -> float:
        """Return the seconds that a share of the rounds did not exceed (nearest rank).

        Args:
            share: The share, in (0, 1].
        """
        return sorted(self.rounds)[max(1, math.ceil(share * len(self.rounds))) - 1]

    def as_result(self) -> dict[str, float | int | bool | None]:
        """Return the times in milliseconds, as keys of a result."""
        return {
            "ms_p50": 1e3 * self.median,
            "ms_p99": 1e3 * self.percentile(0.99),
            "ms_best": 1e3 * min(self.rounds),
            "cpu_ms_p50": 1e3 * self.cpu_median if self.cpu else None,
            "rounds": len(self.rounds),
            "graph": self.graph,
        }


@torch.no_grad()
def time_interleaved(
    calls: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, Times]:
    """Time each entry once per round, after rounds that are not timed.

    On a GPU the calls of an entry are one CUDA graph, if they can be captured.

    Args:
        calls: By name, calls that do the same on different data, so that no cache holds the data of the next call. The
            time of an entry is that of one call.
        device: Device of the calls.
        rounds: Largest number of rounds.
        seconds: Time after which no round begins; at least three rounds are timed.

    Returns:
        Times by name.
    """
    ready = {name: _merge(entry, device) for name, entry in calls.items()}
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP):
        for run, _ in ready.values():
            run()
    repeats = {
        name: 1 if device.type == "cuda" else max(1, math.ceil(_MIN_SECONDS / max(clock(run, device), 1e-7)))
        for name, (run, _) in ready.items()
    }
    start = time.monotonic()
    for i in range(rounds):
        if i >= 3 and time.monotonic() - start > seconds:
            break
        for name, (run, _) in ready.items():
            cpu_start = time.process_time()
            elapsed[name].append(clock(run, device, repeats[name]) / len(calls[name]))
            cpu[name].append((time.process_time() - cpu_start) / repeats[name] / len(calls[name]))
    on_cpu = device.type == "cpu"
    return {n: Times(tuple(elapsed[n]), tuple(cpu[n]) if on_cpu else (), ready[n][1]) for n in calls}


def clock(run: Call, device: torch.device, repeats: int = 1) -> float:
    """Return the mean seconds of a call: by CUDA events on a GPU, by the wall clock on a CPU.

    Args:
        run: The call.
        device: Its device.
        repeats: Number of calls.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def _merge(calls: Sequence[Call], device: torch.device) -> tuple[Call, bool]:
    """Merge calls into one; return also whether it is a CUDA graph."""

    def run_all() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        with suppress(RuntimeError):
            return capture_graph(run_all), True
    return run_all, False


def capture_graph(run: Call) -> Call:
    """Capture a call as a CUDA graph, and return its replay.

    Args:
        run: The call; it runs once before its capture.

    Returns:
        A function that replays the graph; it returns nothing.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
