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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# No markup: a path may hold brackets.
_WIDTH = None if sys.stdout.isatty() else 120
out, err = Console(markup=False, width=_WIDTH), Console(stderr=True, markup=False)


class Walking:
    """Step of a recipe, block (or what else a stage works through), linear and error, or step of training and loss;
    memory and time left, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[step]}{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}  memory {task.fields[memory]}"),
            TimeRemainingColumn(),
            console=err,
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=None, step="", unit="block", told="", memory="-")
        self.notes: list[str] = []

    def __enter__(self) -> Walking:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        import psutil

        memory = in_bytes(psutil.Process().memory_info().rss)
        if event["event"] == "note":
            self.notes.append(event["said"])
        elif event["event"] == "step":
            step = f"step {event['step'] + 1} of {event['steps']} ({', '.join(event['methods'])}), "
            self._bar.reset(self._task, total=None, step=step, unit="block", told="", memory=memory)
        elif event["event"] == "work":
            self._bar.update(self._task, total=event["total"], completed=event["done"], memory=memory)
        elif event["event"] in ("survey", "block"):
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


class Sweeping:
    """All runs of a study, and those in flight, on stderr; where that is no terminal, a line for each that ends."""

    def __init__(self, *, quiet: bool) -> None:
        self._lines = not quiet and not err.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
        )
        self._all = self._bar.add_task("runs", total=None)
        self._running: dict[str, TaskID] = {}
        self._done = self._runs = 0

    def __enter__(self) -> Sweeping:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "sweep":
            self._runs, self._done = event["runs"], event["done"]
            self._bar.update(self._all, total=self._runs, completed=self._done)
            if self._done and self._lines:
                err.print(f"{self._done} of {self._runs} runs were done before", highlight=False)
        elif event["event"] == "run" and event["state"] == "begun":
            self._running[event["run"]] = self._bar.add_task(event["name"], total=None)
        elif event["event"] == "run":
            self._end(event)
        elif (task := self._running.get(event["run"])) is not None:
            if event["event"] in ("survey", "block"):
                self._bar.update(task, total=event["blocks"], completed=event["block"])
            elif event["event"] == "work":
                self._bar.update(task, total=event["total"], completed=event["done"])
            elif event["event"] == "train":
                self._bar.update(task, total=event["steps"], completed=event["step"])

    def _end(self, event: Mapping[str, Any]) -> None:
        self._done += 1
        if (task := self._running.pop(event["run"], None)) is not None:
            self._bar.remove_task(task)
        self._bar.update(self._all, completed=self._done)
        failed = event["state"] == "failed"
        if failed or self._lines:
            how = f"failed: {event['error']}" if failed else f"done in {event['seconds']:.1f} s"
            line = f"run {event['run']} ({event['name']}): {how}"
            line = f"{self._done} of {self._runs}, {line}" if self._lines else line
            err.print(line, style="red" if failed else None, highlight=False, soft_wrap=True)


def print_plan(prepared: Any, as_json: bool) -> None:
    """What a recipe will do: one walk, or several steps."""
    steps = [step.walk or step.stages[0] for step in getattr(prepared, "steps", ())]
    walks = [s for s in steps if hasattr(s, "plan")] or ([] if steps else [prepared])
    if as_json:
        told = _foretold(walks[-1]) if walks else {}
        more = {"steps": [[s.method for s in step.stages] for step in prepared.steps]} if steps else {}
        print_json({**told, **more, "output": str(prepared.output)})
        return
    warn(prepared)
    table = Table(show_header=False, box=None)
    blocks = f" ({len(walks[0].plan.anatomy.taps)} blocks)" if walks else ""
    table.add_row("model", f"{prepared.source.name}{blocks}")
    for number, step in enumerate(steps or [prepared], 1):
        if steps:
            table.add_row(f"step {number}", "a walk" if hasattr(step, "plan") else f"{step.method} on the whole model")
        if hasattr(step, "plan"):
            _add_stages(table, step.plan)
    if walks:
        schemes = _foretold(walks[-1])["schemes"]
        table.add_row("schemes", ", ".join(f"{n} x {s}" for s, n in schemes.items()) or "none")
    windows = prepared.windows
    table.add_row("calibration", "none needed" if windows is None else f"{len(windows)} x {windows.shape[1]} tokens")
    if walks:
        _add_forecast(table, walks[-1].forecast)
    table.add_row("output", str(prepared.output))
    out.print(table)


def _foretold(walk: Any) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for scheme in walk.plan.schemes.values():
        counts[scheme.name] = counts.get(scheme.name, 0) + 1
    return {**asdict(walk.forecast), "schemes": counts, "blocks": len(walk.plan.anatomy.taps)}


def _add_stages(table: Table, plan: Any) -> None:
    for i, (stage, names) in enumerate(zip(plan.stages, plan.touched, strict=True), plan.first):
        table.add_row(f"stage {i}", f"{stage.method} on {len(names)} linears")
    if plan.cache:
        table.add_row("cache", f"{plan.cache[0].method}, {plan.cache[1].layers} layers x {plan.cache[1].heads} heads")


def _add_forecast(table: Table, forecast: Any) -> None:
    smaller = forecast.bytes_before / forecast.bytes_after
    table.add_row(
        "size", f"{in_bytes(forecast.bytes_before)} -> {in_bytes(forecast.bytes_after)} ({smaller:.2f}x smaller)"
    )
    table.add_row("memory", f"about {in_bytes(forecast.peak_bytes)} beyond Python and torch")


def warn(prepared: Any) -> None:
    """Things a user would want to know that are no errors."""
    for warning in dict.fromkeys(_warnings(prepared)):
        err.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def _warnings(prepared: Any) -> Iterator[str]:
    asked, windows = prepared.recipe.calibration, prepared.windows
    if (prepared.source.folder / "adapter" / "adapter_config.json").exists():
        yield f"the adapters in {prepared.source.folder / 'adapter'} are no part of its weights, and are left out"
    if windows is not None and len(windows) < asked.num_calibration_samples:
        yield f"the calibration text fills {len(windows)} of {asked.num_calibration_samples} samples; using those"
    reshaped = False
    for step in getattr(prepared, "steps", ()):
        if step.walk:
            yield from _walk_warnings(step.walk)
            if reshaped:
                yield f"sizes foretold for {step.stages[0].method} are those of the model before it is made smaller"
        else:
            yield from step.stages[0].warnings(prepared.source)
            reshaped |= step.stages[0].reshapes
    if not hasattr(prepared, "steps"):
        yield from _walk_warnings(prepared)


def _walk_warnings(walk: Any) -> Iterator[str]:
    from laconic.pipeline.engines import closed_to_transformers

    unserved = sorted({s.name for s in walk.plan.schemes.values() if s.engine == "transformers"})
    if unserved:
        yield f"vLLM has no kernel for {', '.join(unserved)}; transformers opens it"
    simulated = sorted({s.title for s in walk.plan.schemes.values() if s.simulated})
    if simulated:
        yield f"neither vLLM nor transformers runs {', '.join(simulated)}; its arithmetic is simulated by laconic"
    if any(s.outlier_columns is None for s in walk.plan.schemes.values()):
        yield "how many columns stay in 16 bit is known once calibrated; the size foretold counts none"
    if reason := closed_to_transformers(walk.plan, walk.model):
        yield f"transformers cannot open {reason}; vLLM and laconic.load can"
    if walk.plan.schemes and walk.forecast.covered < 0.5:
        yield f"only {walk.forecast.covered:.0%} of the parameters will be quantized"


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
    odd = {e["block"] for e in log if e.get("event") == "pruned" and _is_odd(e)}
    if odd:
        yield (
            f"{len(odd)} blocks have an odd number of heads or key-value heads, which vLLM cannot split over GPUs "
            "(--tensor-parallel-size)"
        )
    damping = [e["dampening_frac"] for e in log if "dampening_frac" in e]
    if damping and max(damping) > min(damping):
        harder = sum(d > min(damping) for d in damping)
        yield f"the Hessians of {harder} linears were nearly singular: damped by up to {max(damping)} (log.jsonl)"


def _is_odd(event: Mapping[str, Any]) -> bool:
    heads, shared = event.get("heads", 0), event.get("kv_heads", 0)
    # A single key-value head is given to every GPU.
    return bool(heads % 2 or (shared > 1 and shared % 2))


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
