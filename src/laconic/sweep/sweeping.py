"""Work through a study: what is done stays done, the rest runs on Ray where that is installed and one after another
where it is not."""

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
from laconic.checkpoint.atomic import check_place
from laconic.sweep.runs import Run, foretell, plan_runs
from laconic.sweep.study import Resources, Study
from laconic.sweep.table import rows_of, write_table
from laconic.sweep.texts import check_texts
from laconic.sweep.work import LOCKS, STEPS, read_result, work

Watch = Callable[[Mapping[str, Any]], None]


def sweep(
    study: Study, folder: str | Path, *, address: str | None = None, yes: bool = False, watch: Watch = lambda _: None
) -> list[dict[str, Any]]:
    """Compress and measure every run of a study that was not yet, and write `results.parquet` of them all.

    folder: where artifacts (`runs/`), results (`results/`) and the table go. address: of a Ray cluster. yes: however
    many runs there are. watch: called with events: `sweep` (runs, done), `run` (run, name, state: begun, done, failed;
    seconds or error), and those of `compress`, with their run, where it is worked in this process.

    Returns the rows of the table: one for each run and evaluation. Raises: ValueError for what the caller can mend; a
    run that fails does not stop the others, and is in the table with its error.
    """
    if address and not _ray_is_there():
        raise ValueError("--address needs Ray: pip install 'laconic[ray]'")
    runs = plan_runs(study, yes=yes)
    folder = _place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = lock_folder(folder)
    try:
        results = {run.id: result for run in runs if (result := read_result(run, folder))}
        left = [run for run in runs if results.get(run.id, {}).get("status") != "done"]
        check_texts(left)
        watch({"event": "sweep", "runs": len(runs), "done": len(runs) - len(left)})
        try:
            for run, result in _worked(left, folder, study.resources, address, watch):
                results[run.id] = result
                watch({"event": "run", "run": run.id, "name": run.name, "state": result["status"], **_told(result)})
        finally:
            rows = rows_of(runs, results)
            write_table(rows, folder / "results.parquet")
            shutil.rmtree(folder / LOCKS, ignore_errors=True)
        if all(result["status"] == "done" for result in results.values()):
            shutil.rmtree(folder / STEPS, ignore_errors=True)
        return rows
    finally:
        os.close(held)


def dry_run(study: Study, folder: str | Path, *, yes: bool = False) -> list[dict[str, Any]]:
    """The runs of a study, what is known of each, and what the others would take; nothing is written.

    Each has run, name, state (`done`, `failed before`, `to do`), and where it is not done what `foretell` says, and
    seconds: the mean of those that are done, where some are.
    """
    folder = _place(folder)
    runs = plan_runs(study, yes=yes)
    results = {run.id: read_result(run, folder) for run in runs}
    check_texts(run for run in runs if (results[run.id] or {}).get("status") != "done")
    took = [r["seconds"] for r in results.values() if r and r["status"] == "done"]
    listed = []
    for run in runs:
        result = results[run.id]
        row: dict[str, Any] = {"run": run.id, "name": run.name, "values": run.values}
        if result and result["status"] == "done":
            listed.append({**row, "state": "done", "seconds": result["seconds"]})
            continue
        row["state"] = "failed before" if result else "to do"
        row["seconds"] = sum(took) / len(took) if took else None
        listed.append({**row, **foretell(run, folder)})
    return listed


def _worked(
    runs: Sequence[Run], folder: Path, resources: Resources, address: str | None, watch: Watch
) -> Iterator[tuple[Run, dict[str, Any]]]:
    def begin(run: Run) -> None:
        watch({"event": "run", "run": run.id, "name": run.name, "state": "begun"})

    def tell(run: Run, event: Mapping[str, Any]) -> None:
        watch({**event, "run": run.id})

    if runs and _ray_is_there():
        from laconic.sweep.on_ray import work_on_ray

        yield from work_on_ray(runs, folder, resources, address, begin, tell)
        return
    threads = torch.get_num_threads()
    try:
        if resources.cpus:
            torch.set_num_threads(resources.cpus)
        for run in runs:
            begin(run)
            yield run, work(run, folder, partial(tell, run))
    finally:
        torch.set_num_threads(threads)


def _place(folder: str | Path) -> Path:
    """The folder of a sweep. Raises: ValueError where something stands in the way of what is left there."""
    found = Path(folder).expanduser().resolve()
    for name in ("results.parquet", "results/ID.json", "runs/ID/config.json"):
        check_place(found / name)
    return found


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": result["error"]} if result["status"] == "failed" else {"seconds": result["seconds"]}


def _ray_is_there() -> bool:
    return find_spec("ray") is not None
