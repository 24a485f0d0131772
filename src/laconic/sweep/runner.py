"""The study runner: execute the runs that are not done, on Ray if it is installed, else one after another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from laconic.artifact.locks import lock_folder
from laconic.checkpoint.atomic import check_writable
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.sweep.execute import LOCKS, STEPS, execute, read_result, start_event
from laconic.sweep.runs import Run, forecast_run, plan_runs
from laconic.sweep.study import Resources, Study
from laconic.sweep.table import rows_of, write_table
from laconic.sweep.texts import check_texts

Report = Callable[[Mapping[str, Any]], None]


def sweep(
    study: Study,
    folder: str | Path,
    *,
    address: str | None = None,
    yes: bool = False,
    trust: Trust = UNTRUSTED,
    report: Report = lambda _: None,
) -> list[dict[str, Any]]:
    """Compress and measure every run of a study that is not done, and write the table `results.parquet`.

    A run that fails does not stop the others; the table holds its error.

    Args:
        study: The study.
        folder: Folder for artifacts (`runs/`), results (`results/`) and the table.
        address: Address of a Ray cluster; None for a Ray of this machine, if Ray is installed.
        yes: Accept more than 500 runs.
        trust: Permissions of the models' files.
        report: Called with events: `sweep` (runs, done); `run` (run, name, state `started`, `done` or `failed`, seconds
            or error); and the events of `compress`, each with its run, for runs in this process.

    Returns:
        The rows of the table, one per run and evaluation.

    Raises:
        ValueError: The study is invalid, or the folder cannot be used.
    """
    if address and not _ray_installed():
        raise ValueError("--address needs Ray: pip install 'laconic[ray]'")
    runs = plan_runs(study, yes=yes, trust=trust)
    folder = _checked_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock_folder(folder)
    try:
        results = {run.id: result for run in runs if (result := read_result(run, folder))}
        pending = [run for run in runs if results.get(run.id, {}).get("status") != "done"]
        check_texts(pending)
        report({"event": "sweep", "runs": len(runs), "done": len(runs) - len(pending)})
        try:
            for run, result in _execute_all(pending, folder, study.resources, address, report):
                results[run.id] = result
                report({"event": "run", "run": run.id, "name": run.name, **_outcome(result)})
        finally:
            rows = rows_of(runs, results)
            write_table(rows, folder / "results.parquet")
            shutil.rmtree(folder / LOCKS, ignore_errors=True)
        if all(result["status"] == "done" for result in results.values()):
            shutil.rmtree(folder / STEPS, ignore_errors=True)
        return rows
    finally:
        os.close(descriptor)


def dry_run(study: Study, folder: str | Path, *, yes: bool = False, trust: Trust = UNTRUSTED) -> list[dict[str, Any]]:
    """List the runs of a study with their state and a forecast; write nothing.

    Args:
        study: The study.
        folder: Folder of the sweep.
        yes: Accept more than 500 runs.
        trust: Permissions of the models' files.

    Returns:
        One mapping per run: run, name, values, state (`done`, `failed before`, `to do`), seconds (of a run that is
        not done: the mean over those that are, or None), and for runs that are not done the keys of `forecast_run`.

    Raises:
        ValueError: The study is invalid, or the folder cannot be used.
    """
    folder = _checked_folder(folder)
    runs = plan_runs(study, yes=yes, trust=trust)
    results = {run.id: read_result(run, folder) for run in runs}
    check_texts(run for run in runs if (results[run.id] or {}).get("status") != "done")
    seconds = [r["seconds"] for r in results.values() if r and r["status"] == "done"]
    rows = []
    for run in runs:
        result = results[run.id]
        row: dict[str, Any] = {"run": run.id, "name": run.name, "values": run.values}
        if result and result["status"] == "done":
            rows.append({**row, "state": "done", "seconds": result["seconds"]})
            continue
        row["state"] = "failed before" if result else "to do"
        row["seconds"] = sum(seconds) / len(seconds) if seconds else None
        rows.append({**row, **forecast_run(run, folder)})
    return rows


def _execute_all(
    runs: Sequence[Run], folder: Path, resources: Resources, address: str | None, report: Report
) -> Iterator[tuple[Run, dict[str, Any]]]:
    def report_of(run: Run, event: Mapping[str, Any]) -> None:
        report({**event, "run": run.id})

    if runs and _ray_installed():
        from laconic.sweep.on_ray import execute_on_ray

        yield from execute_on_ray(runs, folder, resources, address, report_of)
        return
    threads = torch.get_num_threads()
    try:
        if resources.cpus:
            torch.set_num_threads(resources.cpus)
        for run in runs:
            report_of(run, start_event(run))
            yield run, execute(run, folder, partial(report_of, run))
    finally:
        torch.set_num_threads(threads)


def _checked_folder(folder: str | Path) -> Path:
    """Return the absolute folder of a sweep, after checking that its files can be written."""
    absolute = Path(folder).expanduser().resolve()
    for name in ("results.parquet", "results/ID.json", "runs/ID/config.json"):
        check_writable(absolute / name)
    return absolute


def _outcome(result: Mapping[str, Any]) -> dict[str, Any]:
    key = "error" if result["status"] == "failed" else "seconds"
    return {"state": result["status"], key: result[key]}


def _ray_installed() -> bool:
    return find_spec("ray") is not None
