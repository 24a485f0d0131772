"""The plots of a page: fronts, what each axis of a study does, and the error and the bits of every linear."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart, heat
from laconic.report.gathered import Evaluated, axes_of, grounds, on_ground, spelled
from laconic.report.pareto import dominated

_KL = Axis("KL to the original (nats a token)", zero=True)
_FIGURES = {"kl_mean": "KL to the original (nats a token)", "perplexity": "perplexity"}


def comparable(entries: Sequence[Evaluated]) -> list[Evaluated]:
    """Those that were compared with one original on one text, most of them: what one picture can show."""
    where = next(iter(grounds(entries)), None)
    return [] if where is None else on_ground(entries, where)


def size_front(entries: Sequence[Evaluated]) -> str:
    """Bits per weight against KL; what another beats in both is grey."""
    compared = [(e, e.quality) for e in comparable(entries)]
    points = [(e.name, q["bits_per_weight"], q["kl_mean"]) for e, q in compared if q]
    x = Axis("bits per weight, whole model")
    return _front("Size and quality", points, [(b, kl) for _, b, kl in points], x, "{:.2f} bits per weight")


def speed_front(entries: Sequence[Evaluated]) -> str:
    """Decoding speed over the original's against KL; what another beats in both is grey."""
    compared = [(e, e.quality, e.speed) for e in comparable(entries)]
    points = [(e.name, speed, q["kl_mean"]) for e, q, speed in compared if q and speed is not None]
    x = Axis("decoding speed over the original's", show=lambda v: f"{v:g}x")
    return _front("Speed and quality", points, [(-s, kl) for _, s, kl in points], x, "{:.2f} times as fast")


def _front(
    title: str,
    points: Sequence[tuple[str, float, float]],
    costs: Sequence[tuple[float, float]],
    x: Axis,
    said: str,
) -> str:
    beaten = dominated(costs)
    labelled = sum(not b for b in beaten) <= 12
    marks = [
        Mark(
            at,
            kl,
            f"{name}: {said.format(at)}, KL {kl:.4f}{', beaten by another' if out else ''}",
            "" if out or not labelled else name,
            faint=out,
        )
        for (name, at, kl), out in zip(points, beaten, strict=True)
    ]
    behind = Series("beaten by another in both", [m for m in marks if m.faint], colour=7)
    front = sorted((m for m in marks if not m.faint), key=lambda m: m.x)
    spread = [m.y for m in marks]
    y = Axis(_KL.title, log=True) if spread and min(spread) > 0 and max(spread) > 30 * min(spread) else _KL
    return chart(title, [Series("", front, line=True, dotted=True, colour=0), behind], x, y)


def ablations(entries: Sequence[Evaluated]) -> list[str]:
    """One chart an axis that has several values: KL (or perplexity) by the axis, a line for each choice of the others;
    the mean over seeds, with bars from the lowest to the highest."""
    done = [e for e in entries if e.quality and e.values]
    axes = axes_of(done)
    found = grounds(done)
    # A line for each text that the study measures, or the one that it does without an original.
    parts = [(w[1], on_ground(done, w), "kl_mean") for w in found] if found else [("", done, "perplexity")]
    made = []
    for text, part, figure in parts[:4]:
        for axis in axes:
            if axis != "seed" and len({str(e.values.get(axis)) for e in part if axis in e.values}) > 1:
                others = [a for a in axes if a not in (axis, "seed")]
                title = f"By {axis}" + (f", on {Path(text).name}" if len(found) > 1 else "")
                made.append(_ablation(title, part, axis, others, figure))
    return [m for m in made if m]


def _ablation(title: str, entries: Sequence[Evaluated], axis: str, others: Sequence[str], figure: str) -> str:
    within = [e for e in entries if axis in e.values]
    values = list(dict.fromkeys(spelled(e.values[axis]) for e in within))
    numbers = all(isinstance(e.values[axis], int | float) and not isinstance(e.values[axis], bool) for e in within)
    lines: dict[str, dict[str, list[float]]] = {}
    for e in within:
        line = ", ".join(spelled(e.values[o]) for o in others if o in e.values)
        assert e.quality is not None
        lines.setdefault(line, {}).setdefault(spelled(e.values[axis]), []).append(e.quality[figure])
    place: Callable[[str], float] = float if numbers else values.index
    shown = {name: by for name, by in lines.items() if len(by) > 1} or lines
    series = [
        Series(name, [_averaged(name, v, by[v], place(v), axis) for v in values if v in by], line=True)
        for name, by in list(shown.items())[:8]
    ]
    positions = [float(v) for v in values] if numbers else []
    wide = bool(positions) and min(positions) > 0 and max(positions) >= 8 * min(positions)
    x = Axis(axis, log=wide, ticks=positions) if numbers else Axis(axis, names=values)
    ys = [m.y for s in series for m in s.marks]
    y = Axis(_FIGURES[figure], log=min(ys) > 0 and max(ys) > 30 * min(ys))
    return chart(title, series, x, y, height=360)


def _averaged(line: str, value: str, found: Sequence[float], at: float, axis: str) -> Mark:
    mean = sum(found) / len(found)
    several = len(found) > 1
    said = f"{line + ', ' if line else ''}{axis} {value}: {mean:.4f}"
    if several:
        said += f", {min(found):.4f} to {max(found):.4f} over {len(found)} seeds"
    return Mark(at, mean, said, low=min(found) if several else None, high=max(found) if several else None)


def error_map(entry: Evaluated) -> str:
    """The relative error of every linear that was compressed: kinds of linears by block. Of several stages the last."""
    events = _last_events(entry.log)
    errors = {k: float(e.get("output_error", e.get("weight_error", 0.0))) for k, e in events.items()}
    positive = [v for v in errors.values() if v > 0]
    if not positive:
        return ""
    low, high = math.log(min(positive)), math.log(max(positive))
    kind = "output" if any("output_error" in e for e in events.values()) else "weight"
    return _linears(
        f"{entry.name}: error of each linear",
        errors,
        lambda v: (math.log(v) - low) / (high - low) if v > 0 and high > low else 0.0,
        lambda v: f"{v:.2e}",
        f"blocks; stronger: a larger relative {kind} error",
    )


def bit_map(entry: Evaluated) -> str:
    """The bits of every linear's weights, where they differ."""
    bits = {
        k: float(m[1])
        for k, e in _last_events(entry.log).items()
        if e.get("scheme") and (m := re.match(r"W(\d+)", e["scheme"]))
    }
    if len(set(bits.values())) < 2:
        return ""
    return _linears(f"{entry.name}: bits of each linear", bits, lambda v: v / 16, lambda v: f"{v:g} bits", words=True)


def _last_events(log: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    found = {}
    for event in log:
        m = re.search(r"\.(\d+)\.(.+)$", event["linear"]) if event.get("event") == "linear" else None
        if m:
            found[int(m[1]), m[2]] = event
    return found


def _linears(
    title: str,
    values: Mapping[tuple[int, str], float],
    level: Callable[[float], float],
    said: Callable[[float], str],
    across: str = "blocks",
    words: bool = False,
) -> str:
    blocks = sorted({block for block, _ in values})
    kinds = list(dict.fromkeys(kind for _, kind in values))

    def value(row: int, column: int) -> float | None:
        return values.get((blocks[column], kinds[row]))

    return heat(
        title,
        [str(b) for b in blocks],
        [k.rpartition(".")[2] if len({n.rpartition(".")[2] for n in kinds}) == len(kinds) else k for k in kinds],
        lambda i, j: None if (v := value(i, j)) is None else level(v),
        lambda i, j: f"block {blocks[j]}, {kinds[i]}: {said(value(i, j) or 0.0)}",
        words=(lambda i, j: f"{v:g}" if (v := value(i, j)) is not None else "") if words else lambda _i, _j: "",
        across=across,
    )
