"""Where time and memory went, read from a Chrome trace of torch's profiler by the spans that our own code names."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.walk.span import PREFIX


@dataclass(frozen=True)
class Row:
    """All spans of one path. path: names from the outermost in (`block 3`, `gptq`, `observe`). seconds: of the clock.
    own_seconds: of these, outside of any span within. gpu_seconds: in which the device worked for it, None where there
    is none. peak_bytes: the most that tensors took on the device (or in memory) while it lasted; None where the trace
    has no memory."""

    path: tuple[str, ...]
    count: int
    seconds: float
    own_seconds: float
    gpu_seconds: float | None
    peak_bytes: int | None


@dataclass
class _Sum:
    count: int = 0
    seconds: float = 0.0
    inside: float = 0.0
    gpu: float | None = None
    peak: int | None = None


def read_trace(file: Path) -> list[Row]:
    """The table of a trace, in order of first appearance.

    Raises: ValueError for a file that is no trace, or in which nothing of ours is named.
    """
    try:
        events = json.loads(file.read_text())["traceEvents"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is no Chrome trace; write one with `laconic profile`") from e
    spans = sorted(
        (e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    if not spans:
        raise ValueError(f"{file} names no span of laconic; write one with `laconic profile`")
    times, totals = _memory(events)
    on_gpu = _gpu_seconds(events)
    sums: dict[tuple[str, ...], _Sum] = {}
    open_: list[tuple[float, tuple[str, ...]]] = []
    for event in spans:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while open_ and open_[-1][0] <= begin:
            open_.pop()
        above = open_[-1][1] if open_ else ()
        path = (*above, event["name"].removeprefix(PREFIX))
        seen = sums.setdefault(path, _Sum())
        seen.count += 1
        seen.seconds += event["dur"] / 1e6
        if above:
            sums[above].inside += event["dur"] / 1e6
        if times:
            found = totals[max(0, bisect_left(times, begin) - 1) : bisect_right(times, end)]
            seen.peak = max([seen.peak or 0, *found])
        if on_gpu:
            seen.gpu = (seen.gpu or 0.0) + on_gpu.get(_identity(event), 0.0)
        open_.append((end, path))
    return [Row(p, s.count, s.seconds, max(0.0, s.seconds - s.inside), s.gpu, s.peak) for p, s in sums.items()]


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """The same with all blocks in one: what a stage does, wherever it does it."""
    sums: dict[tuple[str, ...], Row] = {}
    for row in rows:
        path = tuple("blocks" if p.startswith("block ") else p for p in row.path)
        old = sums.get(path)
        sums[path] = row if old is None else _added(old, row)
    return [Row(path, r.count, r.seconds, r.own_seconds, r.gpu_seconds, r.peak_bytes) for path, r in sums.items()]


def _added(a: Row, b: Row) -> Row:
    gpu = None if a.gpu_seconds is None and b.gpu_seconds is None else (a.gpu_seconds or 0) + (b.gpu_seconds or 0)
    peaks = [p for p in (a.peak_bytes, b.peak_bytes) if p is not None]
    peak = max(peaks) if peaks else None
    return Row(a.path, a.count + b.count, a.seconds + b.seconds, a.own_seconds + b.own_seconds, gpu, peak)


def _memory(events: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """When memory was taken or given back, and what was taken in all after it: of the GPU where there is one."""
    found = [e for e in events if e.get("name") == "[memory]"]
    cuda = [e for e in found if e["args"].get("Device Type") == 1]
    chosen = sorted(cuda or found, key=lambda e: e["ts"])
    return [e["ts"] for e in chosen], [int(e["args"]["Total Allocated"]) for e in chosen]


def _gpu_seconds(events: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """How long the device worked for each span."""
    return {
        _identity(e): e["dur"] / 1e6
        for e in events
        if e.get("cat") == "gpu_user_annotation" and e["name"].startswith(PREFIX)
    }


def _identity(event: Mapping[str, Any]) -> Any:
    return event["name"], event.get("args", {}).get("External id")
