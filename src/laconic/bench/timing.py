"""Times of calls that are compared: taken in turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

Call = Callable[[], object]

WARM_UP = 2
# A round that costs less than this on its own is mostly the clock; calls are repeated within it.
_SHORTEST = 2e-3


@dataclass(frozen=True)
class Times:
    """Seconds of a call, over rounds. cpu: processor time of this process in them, which others at work on the machine
    hardly change. graph: whether a CUDA graph replayed it, so that launching takes no time."""

    rounds: tuple[float, ...]
    cpu: tuple[float, ...] = ()
    graph: bool = False

    @property
    def median(self) -> float:
        """The one half of the rounds took at most."""
        return self.percentile(0.5)

    @property
    def worked(self) -> float:
        """The median of processor time; of the clock's where none was taken."""
        return Times(self.cpu or self.rounds).median

    def percentile(self, share: float) -> float:
        """What this share of the rounds took at most (nearest rank)."""
        return sorted(self.rounds)[max(1, math.ceil(share * len(self.rounds))) - 1]

    def told(self) -> dict[str, float | int | bool | None]:
        """Milliseconds, for a result."""
        return {
            "ms_p50": 1e3 * self.median,
            "ms_p99": 1e3 * self.percentile(0.99),
            "ms_best": 1e3 * min(self.rounds),
            "cpu_ms_p50": 1e3 * self.worked if self.cpu else None,
            "rounds": len(self.rounds),
            "graph": self.graph,
        }


@torch.no_grad()
def take_turns(
    contestants: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, Times]:
    """Time each contestant once a round, after rounds that are not counted.

    contestants: by name, calls that do the same on different data, so that no cache holds what the next one reads; the
    time is that of one of them. rounds, seconds: the first that is reached ends it, but not before three rounds. On a
    GPU the calls are one CUDA graph, where they can be captured.
    """
    ready = {name: _ready(calls, device) for name, calls in contestants.items()}
    spans: dict[str, list[float]] = {name: [] for name in contestants}
    worked: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(WARM_UP):
        for run, _ in ready.values():
            run()
    repeats = {
        name: 1 if device.type == "cuda" else max(1, math.ceil(_SHORTEST / max(clock(run, device), 1e-7)))
        for name, (run, _) in ready.items()
    }
    begun = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - begun > seconds:
            break
        for name, (run, _) in ready.items():
            before = time.process_time()
            taken = clock(run, device, repeats[name])
            spans[name].append(taken / len(contestants[name]))
            worked[name].append((time.process_time() - before) / repeats[name] / len(contestants[name]))
    counts = device.type == "cpu"
    return {n: Times(tuple(spans[n]), tuple(worked[n]) if counts else (), ready[n][1]) for n in contestants}


def clock(run: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call, of so many one after another."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def _ready(calls: Sequence[Call], device: torch.device) -> tuple[Call, bool]:
    """All calls as one, and whether that is a CUDA graph."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        with suppress(RuntimeError):
            return captured(all_of_them), True
    return all_of_them, False


def captured(run: Call) -> Call:
    """A CUDA graph of a call, as a call. Raises: RuntimeError when it cannot be captured."""
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
