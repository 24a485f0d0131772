"""Runs as Ray tasks, several at once, each with its own cores and GPUs. No other module imports Ray."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from laconic.artifact.identity import partial_folder
from laconic.sweep.execute import execute, record_failure, start_event
from laconic.sweep.runs import Run
from laconic.sweep.study import Resources

RunReport = Callable[[Run, Mapping[str, Any]], None]


def execute_on_ray(
    runs: Sequence[Run], folder: Path, resources: Resources, address: str | None, report: RunReport
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Execute runs on a Ray cluster, or on a Ray of this machine.

    A run whose worker or node dies is continued once; after a second death it is recorded as failed.

    Args:
        runs: The runs.
        folder: Absolute folder of the sweep. It, the models and the texts are on a disk that every node can read.
        resources: Cores and GPUs of each run.
        address: Address of a Ray cluster; None for a Ray of this machine.
        report: Called with a run and an event: `run` (state `started`) when its folder appears, and `block` when shards
            of blocks appear.

    Yields:
        Each run with its result, in order of completion.

    Raises:
        ValueError: No cluster answers, or no node has the resources of a run.
    """
    # Results of tasks are small; by default Ray would reserve a third of the memory for them.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"no Ray answers at {address or 'this machine'}; check --address: {' '.join(str(e).split())}"
        ) from e
    try:
        cpus, gpus = _share(resources)
        # A decorator could not set the resources, which are known only now.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_task)
        pending = {task.remote(run, folder, Path.cwd(), sys.argv, resources.cpus): run for run in runs}
        shards: dict[str, int] = {}
        while pending:
            done, _ = ray.wait(list(pending), timeout=0.5)
            for run in pending.values():
                _report_progress(run, folder, shards, report)
            for reference in done:
                run = pending.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as e:
                    result = record_failure(run, folder, ValueError(_first_line(e)))
                yield run, result
    finally:
        ray.shutdown()


def _report_progress(run: Run, folder: Path, reported: dict[str, int], report: RunReport) -> None:
    """Report new shards of a run on disk; `reported` holds the number of reported shards by run id."""
    target = run.artifact(folder)
    partial = partial_folder(target)
    if run.id not in reported and (target.exists() or partial.exists()):
        reported[run.id] = 0
        report(run, start_event(run))
    shards = sorted(partial.glob("model-*-of-*.safetensors"))
    if len(shards) > reported.get(run.id, 0):
        reported[run.id] = len(shards)
        report(run, {"event": "block", "block": len(shards), "blocks": int(shards[0].stem.rpartition("-")[2])})


def _task(run: Run, folder: Path, directory: Path, command: list[str], cpus: int | None) -> dict[str, Any]:
    os.chdir(directory)  # paths in a recipe are relative to the working directory of the command
    sys.argv = command
    if cpus:
        torch.set_num_threads(cpus)
    return execute(run, folder)


def _share(resources: Resources) -> tuple[int, float]:
    """Return cores and GPUs of a run: by default one GPU if the cluster has any, else the smallest node's cores."""
    list_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU") for node in nodes)
    gpus = resources.gpus if resources.gpus is not None else float(has_gpus)
    smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    cpus = resources.cpus or (1 if gpus else smallest)
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise ValueError(
            f"a run needs {cpus} cores and {gpus:g} GPUs, and no node of this Ray has as many; lower 'resources'"
        )
    return cpus, gpus


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"its worker died ({type(error).__name__}): {lines[0] if lines else 'Ray gives no reason'}"
