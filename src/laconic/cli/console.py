"""Output of the command line: plans, progress, warnings, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

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

from laconic.pipeline.preview import format_bytes

if TYPE_CHECKING:
    from laconic.pipeline.preview import CompressionPlan

# No markup: a path may hold brackets.
_WIDTH = None if sys.stdout.isatty() else 120
out, err = Console(markup=False, width=_WIDTH), Console(stderr=True, markup=False)


class CompressionProgress:
    """Progress bar of a compression on stderr.

    It shows the step of the recipe; the block, or another unit of work; the linear with its error, or the training step
    with its loss; memory and the time left. Called with the events of `laconic.compress`.

    Attributes:
        notes: Messages of `note` events, to be printed after the bar.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[step]}{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}  memory {task.fields[memory]}"),
            TimeRemainingColumn(),
            console=err,
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=None, step="", unit="block", detail="", memory="-")
        self.notes: list[str] = []

    def __enter__(self) -> CompressionProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        import psutil

        memory = format_bytes(psutil.Process().memory_info().rss)
        if event["event"] == "note":
            self.notes.append(event["message"])
        elif event["event"] == "step":
            step = f"step {event['step'] + 1} of {event['steps']} ({', '.join(event['methods'])}), "
            self._bar.reset(self._task, total=None, step=step, unit="block", detail="", memory=memory)
        elif event["event"] == "work":
            self._bar.update(self._task, total=event["total"], completed=event["done"], memory=memory)
        elif event["event"] in ("survey", "block"):
            self._bar.update(self._task, unit="block", total=event["blocks"], completed=event["block"], memory=memory)
        elif event["event"] == "linear":
            error = event.get("output_error", event["weight_error"])
            self._bar.update(self._task, detail=f"{event['linear']}  error {error:.1e}", memory=memory)
        elif event["event"] == "train":
            held_out = "" if event["held_out"] is None else f", held out {event['held_out']:.4f}"
            self._bar.update(
                self._task,
                unit="step",
                total=event["steps"],
                completed=event["step"],
                detail=f"loss {event['loss']:.4f}{held_out}",
                memory=memory,
            )


class SweepProgress:
    """Progress bars of a study on stderr: all runs, and each run in progress.

    Where stderr is no terminal, one line per finished run. Called with the events of `laconic.sweep.runner.sweep`.
    """

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

    def __enter__(self) -> SweepProgress:
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
        elif event["event"] == "run" and event["state"] == "started":
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
            outcome = f"failed: {event['error']}" if failed else f"done in {event['seconds']:.1f} s"
            line = f"run {event['run']} ({event['name']}): {outcome}"
            line = f"{self._done} of {self._runs}, {line}" if self._lines else line
            err.print(line, style="red" if failed else None, highlight=False, soft_wrap=True)


def print_plan(plan: CompressionPlan, as_json: bool) -> None:
    """Print what a recipe will do: its table on stdout and its warnings on stderr, or one JSON object.

    Args:
        plan: The plan.
        as_json: Print one JSON object instead of the table and the warnings.
    """
    if as_json:
        print_json(plan.to_dict())
        return
    print_warnings(plan)
    table = Table(show_header=False, box=None)
    for name, value in plan.rows():
        table.add_row(name, value)
    out.print(table)


def print_warnings(plan: CompressionPlan) -> None:
    """Print the warnings of a plan on stderr.

    Args:
        plan: The plan.
    """
    for warning in plan.warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def plan_notes(log: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what the plan of an artifact decided that the user may not expect.

    Args:
        log: Events of the artifact's `log.jsonl`.
    """
    from laconic.formats.tiling import AUTO_GROUP_SIZES

    for event in (e for e in log if e.get("event") == "group_sizes"):
        if {size["group_size"] for size in event["sizes"]} != {AUTO_GROUP_SIZES[0]}:
            yield event["message"]
    for event in (e for e in log if "kl" in e):
        yield f"{event['linear']} in {event['scheme']} alone moves the output by a KL of {event['kl']:.4f} nats a token"


def calibration_notes(log: list[dict[str, Any]]) -> Iterator[str]:
    """Yield notes on calibration from an artifact's log that the user may want to act on.

    Args:
        log: Events of the artifact's `log.jsonl`.
    """
    dead = [e for e in log if e.get("dead_columns")]
    if dead:
        count = sum(e["dead_columns"] for e in dead)
        yield f"{count} inputs of {len(dead)} linears were always zero in calibration; rounded to nearest (log.jsonl)"
    wide = [e for e in log if e.get("outlier_share", 0) > 0.1]
    if wide:
        largest = max(e["outlier_share"] for e in wide)
        yield (
            f"{len(wide)} linears keep up to {largest:.0%} of their inputs in 16 bit (log.jsonl); "
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
    heads, kv_heads = event.get("heads", 0), event.get("kv_heads", 0)
    # Every GPU gets a copy of a single key-value head.
    return bool(heads % 2 or (kv_heads > 1 and kv_heads % 2))


def with_status(measure: Callable[..., Any], *arguments: Any, quiet: bool) -> Any:
    """Call a function, and show on stderr what it reports (`report=`) while it runs.

    Args:
        measure: Function with a keyword argument `report`, to which it passes lines of text.
        *arguments: Its positional arguments.
        quiet: Show nothing.

    Returns:
        The result of `measure`.
    """
    if quiet or not err.is_terminal:
        return measure(*arguments)
    with err.status("") as status:
        return measure(*arguments, report=status.update)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; NaN and infinity, which JSON lacks, become null.

    Args:
        value: Mappings, lists and plain values; any other value is written as its text.
    """
    sys.stdout.write(json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
