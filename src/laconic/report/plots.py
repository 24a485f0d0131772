"""Charts of a report: Pareto fronts, ablations over the axes of a study, and heat maps of linears."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laconic.report.chart import Axis, Cells, Mark, Series, chart, heat_chart
from laconic.report.entries import ReportEntry, axes_of, common_settings, format_value, with_setting
from laconic.report.pareto import dominated

_KL = Axis("KL to the original (nats per token)", zero=True)
_FIGURES = {"kl_mean": "KL to the original (nats per token)", "perplexity": "perplexity"}


def comparable(entries: Sequence[ReportEntry]) -> list[ReportEntry]:
    """Return the entries that were compared with the original in the most common setting.

    Args:
        entries: The entries.
    """
    setting = next(iter(common_settings(entries)), None)
    return [] if setting is None else with_setting(entries, setting)


def size_front(entries: Sequence[ReportEntry]) -> str:
    """Draw KL over bits per weight; dominated entries are grey.

    Args:
        entries: The entries; only `comparable` ones are drawn.

    Returns:
        The chart as SVG; empty if there is nothing to draw.
    """
    compared = [(e, e.quality) for e in comparable(entries)]
    points = [(e.name, q["bits_per_weight"], q["kl_mean"]) for e, q in compared if q]
    x = Axis("bits per weight, whole model")
    return _front("Size and quality", points, [(b, kl) for _, b, kl in points], x, "{:.2f} bits per weight")


def speed_front(entries: Sequence[ReportEntry]) -> str:
    """Draw KL over the decoding speed relative to the original; dominated entries are grey.

    Args:
        entries: The entries; only `comparable` ones with a decoding speed are drawn.

    Returns:
        The chart as SVG; empty if there is nothing to draw.
    """
    compared = [(e, e.quality, e.speed) for e in comparable(entries)]
    points = [(e.name, speed, q["kl_mean"]) for e, q, speed in compared if q and speed is not None]
    x = Axis("decoding speed relative to the original", show=lambda v: f"{v:g}x")
    return _front("Speed and quality", points, [(-s, kl) for _, s, kl in points], x, "{:.2f} times as fast")


def _front(
    title: str,
    points: Sequence[tuple[str, float, float]],
    costs: Sequence[tuple[float, float]],
    x: Axis,
    template: str,
) -> str:
    flags = dominated(costs)
    with_labels = flags.count(False) <= 12
    marks = [
        Mark(
            value,
            kl,
            f"{name}: {template.format(value)}, KL {kl:.4f}{', dominated' if flag else ''}",
            name if with_labels and not flag else "",
            faint=flag,
        )
        for (name, value, kl), flag in zip(points, flags, strict=True)
    ]
    behind = Series("dominated", [m for m in marks if m.faint], colour=7)
    front = sorted((m for m in marks if not m.faint), key=lambda m: m.x)
    kls = [m.y for m in marks]
    y = Axis(_KL.title, log=True) if kls and min(kls) > 0 and max(kls) > 30 * min(kls) else _KL
    return chart(title, [Series("", front, line=True, dotted=True, colour=0), behind], x, y)


def ablations(entries: Sequence[ReportEntry]) -> list[str]:
    """Draw one chart per axis of a study with several values.

    A chart shows KL (or perplexity, without an original) over the values of the axis, with one line per combination of
    the other axes. Points are means over seeds, with bars from the lowest to the highest value.

    Args:
        entries: Runs of studies.

    Returns:
        The charts as SVG, at most four texts.
    """
    done = [e for e in entries if e.quality and e.values]
    axes = axes_of(done)
    settings = common_settings(done)
    parts = [(s[1], with_setting(done, s), "kl_mean") for s in settings] if settings else [("", done, "perplexity")]
    charts = []
    for text, part, figure in parts[:4]:
        for axis in axes:
            if axis != "seed" and len({str(e.values.get(axis)) for e in part if axis in e.values}) > 1:
                other_axes = [a for a in axes if a not in (axis, "seed")]
                title = f"By {axis}" + (f", on {Path(text).name}" if len(settings) > 1 else "")
                charts.append(_ablation(title, part, axis, other_axes, figure))
    return [c for c in charts if c]


def _ablation(title: str, entries: Sequence[ReportEntry], axis: str, other_axes: Sequence[str], figure: str) -> str:
    within = [e for e in entries if axis in e.values]
    values = list(dict.fromkeys(format_value(e.values[axis]) for e in within))
    numbers = all(isinstance(e.values[axis], int | float) and not isinstance(e.values[axis], bool) for e in within)
    lines: dict[str, dict[str, list[float]]] = {}
    for e in within:
        line = ", ".join(format_value(e.values[o]) for o in other_axes if o in e.values)
        assert e.quality is not None
        lines.setdefault(line, {}).setdefault(format_value(e.values[axis]), []).append(e.quality[figure])
    position: Callable[[str], float] = float if numbers else values.index
    shown = {name: by for name, by in lines.items() if len(by) > 1} or lines
    series = [
        Series(
            name,
            [_mean_mark(f"{name}, " * bool(name) + f"{axis} {v}", by[v], position(v)) for v in values if v in by],
            line=True,
        )
        for name, by in list(shown.items())[:8]
    ]
    positions = [float(v) for v in values] if numbers else []
    wide = bool(positions) and min(positions) > 0 and max(positions) >= 8 * min(positions)
    x = Axis(axis, log=wide, ticks=positions) if numbers else Axis(axis, names=values)
    ys = [m.y for s in series for m in s.marks]
    y = Axis(_FIGURES[figure], log=min(ys) > 0 and max(ys) > 30 * min(ys))
    return chart(title, series, x, y, height=360)


def _mean_mark(name: str, values: Sequence[float], position: float) -> Mark:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Mark(position, mean, f"{name}: {mean:.4f}")
    low, high = min(values), max(values)
    tooltip = f"{name}: {mean:.4f}, {low:.4f} to {high:.4f} over {len(values)} seeds"
    return Mark(position, mean, tooltip, low=low, high=high)


def error_map(entry: ReportEntry) -> str:
    """Draw the relative error of every compressed linear after the last stage: kinds of linears by block.

    Args:
        entry: The entry, of which the log is read.

    Returns:
        A heat map as SVG, on a logarithmic scale; empty if no linear has an error above 0.
    """
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
        level=lambda v: (math.log(v) - low) / (high - low) if v > 0 and high > low else 0.0,
        describe=lambda v: f"{v:.2e}",
        across=f"blocks; darker: larger relative {kind} error",
    )


def bit_map(entry: ReportEntry) -> str:
    """Draw the bits of every linear's weights.

    Args:
        entry: The entry, of which the log is read.

    Returns:
        A heat map as SVG; empty if all bits are equal.
    """
    bits = {
        k: float(m[1])
        for k, e in _last_events(entry.log).items()
        if e.get("scheme") and (m := re.match(r"W(\d+)", e["scheme"]))
    }
    if len(set(bits.values())) < 2:
        return ""
    return _linears(
        f"{entry.name}: bits of each linear",
        bits,
        level=lambda v: v / 16,
        describe=lambda v: f"{v:g} bits",
        with_text=True,
    )


def _last_events(log: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    events = {}
    for event in log:
        m = re.search(r"\.(\d+)\.(.+)$", event["linear"]) if event.get("event") == "linear" else None
        if m:
            events[int(m[1]), m[2]] = event
    return events


def _linears(
    title: str,
    values: Mapping[tuple[int, str], float],
    *,
    level: Callable[[float], float],
    describe: Callable[[float], str],
    across: str = "blocks",
    with_text: bool = False,
) -> str:
    blocks = sorted({block for block, _ in values})
    kinds = list(dict.fromkeys(kind for _, kind in values))

    def value(row: int, column: int) -> float | None:
        return values.get((blocks[column], kinds[row]))

    def text(row: int, column: int) -> str:
        v = value(row, column)
        return f"{v:g}" if with_text and v is not None else ""

    short = [kind.rpartition(".")[2] for kind in kinds]
    cells = Cells(
        level=lambda i, j: None if (v := value(i, j)) is None else level(v),
        tooltip=lambda i, j: f"block {blocks[j]}, {kinds[i]}: {describe(value(i, j) or 0.0)}",
        text=text,
    )
    labels = short if len(set(short)) == len(kinds) else kinds
    return heat_chart(title, [str(b) for b in blocks], labels, cells, across=across)
