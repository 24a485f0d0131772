"""Summary of a benchmark in one line per form or model, also where there is no speed-up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
# A smaller speed-up is within the variation between runs.
MIN_SPEEDUP = 1.03


def linear_verdicts(rows: Rows) -> Iterator[str]:
    """Yield one line per form: its speed-up over the dense product of its dtype, by number of tokens.

    Speed-ups are geometric means over shapes.

    Args:
        rows: Rows of linears of a result.
    """
    for form in dict.fromkeys(r["form"] for r in rows if r["kind"] != "dense"):
        yield _form_verdict(form, [r for r in rows if r["form"] == form])
    # The first dense form has the requested dtype.
    first, *narrow = dict.fromkeys(r["dtype"] for r in rows if r["kind"] == "dense") or [""]
    for dtype in narrow:
        for form in dict.fromkeys(r["form"] for r in rows if r["dtype"] == dtype and "speedup_over_16_bit" in r):
            measured = [r for r in rows if r["form"] == form and "speedup_over_16_bit" in r]
            yield f"{form}, over dense {first}: {_listed(_by_batch(measured, 'speedup_over_16_bit'))} tokens"


def _form_verdict(form: str, rows: Rows) -> str:
    measured = [r for r in rows if r.get("speedup")]
    if not measured:
        return f"{form}: not measured ({rows[0].get('unavailable', 'no dense product to compare with')})"
    by_batch = _by_batch(measured, "speedup")
    line = f"{form}: {_listed(by_batch)} tokens"
    if measured[0]["kind"] == "unstructured" and "dense" in measured[0]["kernel"]:
        return f"{line}; no engine here uses such zeros, a dense product multiplies them too"
    if max(by_batch.values()) < MIN_SPEEDUP:
        return f"{line}: no speed-up"
    slower = [str(b) for b, speedup in by_batch.items() if speedup < 1 / MIN_SPEEDUP]
    return line + (f"; slower than dense at {', '.join(slower)}" if slower else "")


def model_verdicts(rows: Rows) -> Iterator[str]:
    """Yield one line per model: its speed-up over the first one.

    Args:
        rows: Rows of models of a result, the one to compare with first.
    """
    for row in rows[1:]:
        prefill, decode = row["prefill"]["speedup"], row["decode"]["speedup"]
        line = f"{row['name']}: prefill {prefill:.2f}x, decode {decode:.2f}x of {rows[0]['name']}"
        zeros = 1 - row["linear_nonzero"] / row["linear_weights"]
        if zeros > 0.05 and not row["sparse_kernels"]:
            line += f"; {zeros:.0%} of its linear weights are zeros, which dense kernels multiply as any number"
        elif max(prefill, decode) < MIN_SPEEDUP:
            line += ": no speed-up"
        yield line


def serving_verdicts(rows: Rows) -> Iterator[str]:
    """Yield one line per served model: its speed-up over the first one while it decodes, and its memory.

    Args:
        rows: Models of a result of `laconic bench serving`.
    """
    for row in rows:
        compared = [r for r in row["rows"] if r.get("decode_speedup")]
        failed = [f"{r['batch']} x {r['prompt']}" for r in row["rows"] if "error" in r]
        line = f"{row['name']}: "
        if row is rows[0] or not compared:
            timed = [r for r in row["rows"] if "error" not in r]
            line += ", ".join(f"{r['decode_tokens_per_second']:.4g} tokens/s at {r['batch']}" for r in timed)
        else:
            line += "decode " + ", ".join(
                f"{r['decode_speedup']:.2f}x at {r['batch']} x {r['prompt']}" for r in compared
            )
            slower = [r for r in compared if r["decode_speedup"] < 1 / MIN_SPEEDUP]
            line += f"; slower than {rows[0]['name']} at {', '.join(str(r['batch']) for r in slower)}" if slower else ""
        if row.get("cache_tokens"):
            line += f"; the cache holds {row['cache_tokens']:,} tokens"
        yield line + (f"; out of memory at {', '.join(failed)}" if failed else "")


def busy_verdict(measurements: Rows) -> Iterator[str]:
    """Yield a line if other processes used the processor for much of the time.

    A short call then often runs without interruption, and a long one does not, so that ratios of elapsed time favour
    the shorter call.

    Args:
        measurements: All results with times.
    """
    timed = [m for m in measurements if m.get("cpu_ms_p50")]
    if not timed:
        return
    share = sum(m["cpu_ms_p50"] for m in timed) / sum(m["ms_p50"] for m in timed)
    if share < 0.9:
        yield (
            f"the machine was busy: this process ran {share:.0%} of the time; use ratios of processor time "
            "(cpu_speedup in --json) instead of these, or run again on an idle machine"
        )


def geometric_mean(values: Sequence[float]) -> float:
    """Compute the geometric mean.

    Args:
        values: Positive numbers, at least one.

    Returns:
        Their geometric mean.
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def _by_batch(rows: Rows, key: str) -> dict[int, float]:
    return {b: geometric_mean([r[key] for r in rows if r["batch"] == b]) for b in sorted({r["batch"] for r in rows})}


def _listed(by_batch: Mapping[int, float]) -> str:
    return ", ".join(f"{speedup:.2f}x at {b}" for b, speedup in by_batch.items())
