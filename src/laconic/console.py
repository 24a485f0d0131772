"""What the command line prints: plans, progress, warnings, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# No markup: a path may hold brackets.
_WIDTH = None if sys.stdout.isatty() else 120
out, err = Console(markup=False, width=_WIDTH), Console(stderr=True, markup=False)


class Walking:
    """Block, linear and error, or step and loss; memory and time left, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}  memory {task.fields[memory]}"),
            TimeRemainingColumn(),
            console=err,
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=None, unit="block", told="", memory="-")

    def __enter__(self) -> Walking:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        import psutil

        memory = in_bytes(psutil.Process().memory_info().rss)
        if event["event"] == "block":
            self._bar.update(self._task, unit="block", total=event["blocks"], completed=event["block"], memory=memory)
        elif event["event"] == "linear":
            error = event.get("output_error", event["weight_error"])
            self._bar.update(self._task, told=f"{event['linear']}  error {error:.1e}", memory=memory)
        elif event["event"] == "train":
            held = "" if event["held_out"] is None else f", held out {event['held_out']:.4f}"
            self._bar.update(
                self._task,
                unit="step",
                total=event["steps"],
                completed=event["step"],
                told=f"loss {event['loss']:.4f}{held}",
                memory=memory,
            )


def print_plan(prepared: Any, as_json: bool) -> None:
    plan, forecast = prepared.plan, prepared.forecast
    schemes: dict[str, int] = {}
    for scheme in plan.schemes.values():
        schemes[scheme.name] = schemes.get(scheme.name, 0) + 1
    if as_json:
        print_json(
            {
                **asdict(forecast),
                "schemes": schemes,
                "blocks": len(plan.anatomy.taps),
                "output": str(prepared.output),
            }
        )
        return
    warn(prepared)
    table = Table(show_header=False, box=None)
    table.add_row("model", f"{prepared.source.name} ({len(plan.anatomy.taps)} blocks)")
    for i, (stage, names) in enumerate(zip(plan.stages, plan.touched, strict=True)):
        table.add_row(f"stage {i}", f"{stage.method} on {len(names)} linears")
    if plan.cache:
        table.add_row("cache", f"{plan.cache[0].method}, {plan.cache[1].layers} layers x {plan.cache[1].heads} heads")
    table.add_row("schemes", ", ".join(f"{n} x {s}" for s, n in schemes.items()) or "none")
    samples = (
        "none needed" if prepared.windows is None else f"{len(prepared.windows)} x {prepared.windows.shape[1]} tokens"
    )
    table.add_row("calibration", samples)
    smaller = forecast.bytes_before / forecast.bytes_after
    table.add_row(
        "size", f"{in_bytes(forecast.bytes_before)} -> {in_bytes(forecast.bytes_after)} ({smaller:.2f}x smaller)"
    )
    table.add_row("memory", f"about {in_bytes(forecast.peak_bytes)} beyond Python and torch")
    table.add_row("output", str(prepared.output))
    out.print(table)


def warn(prepared: Any) -> None:
    """Things a user would want to know that are no errors."""
    for warning in _warnings(prepared):
        err.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def _warnings(prepared: Any) -> Iterator[str]:
    from laconic.engine.engines import closed_to_transformers

    asked, windows = prepared.recipe.calibration, prepared.windows
    if windows is not None and len(windows) < asked.num_calibration_samples:
        yield f"the calibration text fills {len(windows)} of {asked.num_calibration_samples} samples; using those"
    unserved = sorted({s.name for s in prepared.plan.schemes.values() if s.engine == "transformers"})
    if unserved:
        yield f"vLLM has no kernel for {', '.join(unserved)}; transformers opens it"
    simulated = sorted({s.title for s in prepared.plan.schemes.values() if s.simulated})
    if simulated:
        yield f"neither vLLM nor transformers runs {', '.join(simulated)}; its arithmetic is simulated by laconic"
    if any(s.outlier_columns is None for s in prepared.plan.schemes.values()):
        yield "how many columns stay in 16 bit is known once calibrated; the size foretold counts none"
    if reason := closed_to_transformers(prepared.plan, prepared.model):
        yield f"transformers cannot open {reason}; vLLM and laconic.load can"
    if prepared.plan.schemes and prepared.forecast.covered < 0.5:
        yield f"only {prepared.forecast.covered:.0%} of the parameters will be quantized"


def remarks(log: list[dict[str, Any]]) -> Iterator[str]:
    """What the calibration set could not say, from the log."""
    dead = [e for e in log if e.get("dead_columns")]
    if dead:
        count = sum(e["dead_columns"] for e in dead)
        yield f"{count} inputs of {len(dead)} linears were always zero in calibration; rounded to nearest (log.jsonl)"
    loud = [e for e in log if e.get("outlier_share", 0) > 0.1]
    if loud:
        most = max(e["outlier_share"] for e in loud)
        yield (
            f"{len(loud)} linears keep up to {most:.0%} of their inputs in 16 bit (log.jsonl); "
            "for a smaller file raise the threshold there, or give outlier_ratio"
        )
    few = [e for e in log if e.get("event") == "few_tokens"]
    if few:
        least = min(few, key=lambda e: e["tokens"])
        yield (
            f"{len(few)} inputs of linears saw fewer tokens than they are wide, the least {least['message']}; use more "
            "samples, or calibration.moe_calibrate_all_experts"
        )
    damping = [e["dampening_frac"] for e in log if "dampening_frac" in e]
    if damping and max(damping) > min(damping):
        harder = sum(d > min(damping) for d in damping)
        yield f"the Hessians of {harder} linears were nearly singular: damped by up to {max(damping)} (log.jsonl)"


def in_bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity; they become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
