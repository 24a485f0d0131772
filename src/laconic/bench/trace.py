"""Time and memory of named spans, read from a Chrome trace of torch's profiler."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.walk.spans import PREFIX


@dataclass(frozen=True)
class Row:
    """All spans of one path.

    Attributes:
        path: Names of the spans from the outermost inwards (`block 3`, `gptq`, `observe`).
        count: Number of spans.
        seconds: Elapsed time.
        own_seconds: Elapsed time outside inner spans.
        gpu_seconds: Time of the GPU's work for these spans; None if the trace has none.
        peak_bytes: Peak of allocated memory, of the GPU if there is one; None if the trace has no memory events.
    """

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
    inner_seconds: float = 0.0
    gpu_seconds: float | None = None
    peak_bytes: int | None = None


def read_trace(file: Path) -> list[Row]:
    """Read the spans of a trace, in order of first appearance.

    Args:
        file: A Chrome trace in JSON, from `laconic profile`.

    Returns:
        One row per path of nested spans.

    Raises:
        ValueError: The file is not a trace, or has no span of Laconic.
    """
    try:
        events = json.loads(file.read_text())["traceEvents"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not a Chrome trace; write one with `laconic profile`") from e
    spans = sorted(
        (e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    if not spans:
        raise ValueError(f"{file} has no span of laconic; write one with `laconic profile`")
    times, allocated = _memory(events)
    gpu_seconds = _gpu_seconds(events)
    sums: dict[tuple[str, ...], _Sum] = {}
    open_spans: list[tuple[float, tuple[str, ...]]] = []
    for event in spans:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while open_spans and open_spans[-1][0] <= begin:
            open_spans.pop()
        parent = open_spans[-1][1] if open_spans else ()
        path = (*parent, event["name"].removeprefix(PREFIX))
        total = sums.setdefault(path, _Sum())
        total.count += 1
        total.seconds += event["dur"] / 1e6
        if parent:
            sums[parent].inner_seconds += event["dur"] / 1e6
        if times:
            inside = allocated[max(0, bisect_left(times, begin) - 1) : bisect_right(times, end)]
            total.peak_bytes = max([total.peak_bytes or 0, *inside])
        if gpu_seconds:
            total.gpu_seconds = (total.gpu_seconds or 0.0) + gpu_seconds.get(_identity(event), 0.0)
        open_spans.append((end, path))
    return [
        Row(p, s.count, s.seconds, max(0.0, s.seconds - s.inner_seconds), s.gpu_seconds, s.peak_bytes)
        for p, s in sums.items()
    ]


def merge_blocks(rows: Sequence[Row]) -> list[Row]:
    """Add up the rows of all blocks, so that a stage has one row.

    Args:
        rows: Rows of `read_trace`.

    Returns:
        One row per path, with `blocks` in the place of `block 0`, `block 1`, ...; seconds and counts are sums, and peak
        bytes the largest.
    """
    sums: dict[tuple[str, ...], Row] = {}
    for row in rows:
        path = tuple("blocks" if p.startswith("block ") else p for p in row.path)
        sums[path] = _add(sums[path], row) if path in sums else row
    return [Row(path, r.count, r.seconds, r.own_seconds, r.gpu_seconds, r.peak_bytes) for path, r in sums.items()]


def _add(a: Row, b: Row) -> Row:
    gpu = None if a.gpu_seconds is None and b.gpu_seconds is None else (a.gpu_seconds or 0) + (b.gpu_seconds or 0)
    peaks = [p for p in (a.peak_bytes, b.peak_bytes) if p is not None]
    peak = max(peaks) if peaks else None
    return Row(a.path, a.count + b.count, a.seconds + b.seconds, a.own_seconds + b.own_seconds, gpu, peak)


def _memory(events: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """Return the times of memory events and the allocated bytes after each, of the GPU if there is one."""
    memory = [e for e in events if e.get("name") == "[memory]"]
    cuda = [e for e in memory if e["args"].get("Device Type") == 1]
    ordered = sorted(cuda or memory, key=lambda e: e["ts"])
    return [e["ts"] for e in ordered], [int(e["args"]["Total Allocated"]) for e in ordered]


def _gpu_seconds(events: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """Return the seconds of the GPU's work by span."""
    return {
        _identity(e): e["dur"] / 1e6
        for e in events
        if e.get("cat") == "gpu_user_annotation" and e["name"].startswith(PREFIX)
    }


def _identity(event: Mapping[str, Any]) -> Any:
    return event["name"], event.get("args", {}).get("External id")
