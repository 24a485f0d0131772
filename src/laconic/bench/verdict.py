"""What was measured, said in a line each: how much faster, and plainly where nothing is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Less than this is within what runs differ by.
NOTICED = 1.03


def linear_verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a form: its speed-up over the dense product of its dtype, the geometric mean over shapes, by tokens."""
    for form in dict.fromkeys(r["form"] for r in rows if r["kind"] != "dense"):
        ours = [r for r in rows if r["form"] == form]
        measured = [r for r in ours if r.get("speedup")]
        if not measured:
            yield f"{form}: not here ({ours[0].get('unavailable', 'no dense product to compare with')})"
            continue
        by_batch = {b: mean([r["speedup"] for r in measured if r["batch"] == b]) for b in _batches(measured)}
        said = _listed(by_batch)
        if measured[0]["kind"] == "unstructured" and "dense" in measured[0]["kernel"]:
            yield f"{form}: {said} tokens; no engine here uses such zeros, a dense product multiplies them too"
        elif max(by_batch.values()) < NOTICED:
            yield f"{form}: {said} tokens: no speed-up"
        else:
            slower = [str(b) for b, x in by_batch.items() if x < 1 / NOTICED]
            yield f"{form}: {said} tokens" + (f"; slower than dense at {', '.join(slower)}" if slower else "")
    # The first dense form is that of the dtype asked for.
    first, *narrow = dict.fromkeys(r["dtype"] for r in rows if r["kind"] == "dense") or [""]
    for dtype in narrow:
        for form in dict.fromkeys(r["form"] for r in rows if r["dtype"] == dtype and "speedup_over_16_bit" in r):
            yield f"{form}, over dense {first}: {_listed(_over_16_bit(rows, form))} tokens"


def model_verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a model: what it gains over the first."""
    for row in rows[1:]:
        prefill, decode = row["prefill"]["speedup"], row["decode"]["speedup"]
        said = f"{row['name']}: prefill {prefill:.2f}x, decode {decode:.2f}x of {rows[0]['name']}"
        zeros = 1 - row["linear_nonzero"] / row["linear_weights"]
        if zeros > 0.05 and not row["sparse_kernels"]:
            said += f"; {zeros:.0%} of its linear weights are zeros, which dense kernels multiply as any number"
        elif max(prefill, decode) < NOTICED:
            said += ": no speed-up"
        yield said


def _over_16_bit(rows: Sequence[Mapping[str, Any]], form: str) -> dict[int, float]:
    ours = [r for r in rows if r["form"] == form and "speedup_over_16_bit" in r]
    return {b: mean([r["speedup_over_16_bit"] for r in ours if r["batch"] == b]) for b in _batches(ours)}


def _listed(by_batch: Mapping[int, float]) -> str:
    return ", ".join(f"{x:.2f}x at {b}" for b, x in by_batch.items())


def busy_verdict(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line where other work had the processor for a good part of the time: short calls then fit between two turns of
    that work, long ones do not, and the clock's ratios flatter the shorter. parts: all that has times.
    """
    timed = [p for p in parts if p.get("cpu_ms_p50")]
    if not timed:
        return
    share = sum(p["cpu_ms_p50"] for p in timed) / sum(p["ms_p50"] for p in timed)
    if share < 0.9:
        yield (
            f"the machine was busy: this process worked {share:.0%} of the time; trust ratios of processor time "
            "(cpu_speedup in --json) rather than these, or run again on a quiet machine"
        )


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _batches(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({r["batch"] for r in rows})
