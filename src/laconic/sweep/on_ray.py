"""Runs as tasks on Ray, several at once, each with the cores and GPUs it was given. Only this file knows of Ray."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from laconic.artifact.workspace import partial_of
from laconic.sweep.runs import Run
from laconic.sweep.study import Resources
from laconic.sweep.work import remember_failure, work

Begin = Callable[[Run], None]
Tell = Callable[[Run, Mapping[str, Any]], None]


def work_on_ray(
    runs: Sequence[Run], folder: Path, resources: Resources, address: str | None, begin: Begin, tell: Tell
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Work runs on a cluster, or on a Ray of this machine; yields each with its result, as they are done.

    folder: absolute, and with the models and texts on a disk that every node sees. begin: called when a run is seen to
    have begun. tell: called with a `block` event when more of its blocks are seen to be done. A worker that dies, or
    its node, loses the run in flight, which is gone on with once more and then remembered as failed.
    Raises: ValueError when no cluster answers, or no node of it has what a run takes.
    """
    # What tasks give back is small: without a word Ray would take a third of the memory to keep it in.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ValueError(f"no Ray answers at {address or 'this machine'}: {' '.join(str(e).split())}") from e
    try:
        cpus, gpus = _share(resources)
        # Options are settled when tasks are made: a decorator could not know them.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_task)
        left = {task.remote(run, folder, Path.cwd(), sys.argv, resources.cpus): run for run in runs}
        seen: dict[str, int] = {}
        while left:
            done, _ = ray.wait(list(left), timeout=0.5)
            for run in left.values():
                _look(run, folder, seen, begin, tell)
            for reference in done:
                run = left.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as e:
                    result = remember_failure(run, folder, ValueError(_first_line(e)))
                yield run, result
    finally:
        ray.shutdown()


def _look(run: Run, folder: Path, seen: dict[str, int], begin: Begin, tell: Tell) -> None:
    """Tell what of a run is on the disk and was not yet told. seen: shards, by run."""
    target = run.artifact(folder)
    partial = partial_of(target)
    if run.id not in seen and (target.exists() or partial.exists()):
        seen[run.id] = 0
        begin(run)
    shards = sorted(partial.glob("model-*-of-*.safetensors"))
    if len(shards) > seen.get(run.id, 0):
        seen[run.id] = len(shards)
        tell(run, {"event": "block", "block": len(shards), "blocks": int(shards[0].stem.rpartition("-")[2])})


def _task(run: Run, folder: Path, at: Path, command: list[str], cpus: int | None) -> dict[str, Any]:
    os.chdir(at)  # paths in a recipe are those of who asked
    sys.argv = command
    if cpus:
        torch.set_num_threads(cpus)
    return work(run, folder)


def _share(resources: Resources) -> tuple[int, float]:
    """Cores and GPUs of a run. Without a word: one GPU where there are any, else all cores of the smallest node."""
    of_cluster: Callable[[], list[dict[str, Any]]] = ray.nodes
    nodes = [node["Resources"] for node in of_cluster() if node["Alive"]]
    there = any(node.get("GPU") for node in nodes)
    gpus = resources.gpus if resources.gpus is not None else float(there)
    whole = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    cpus = resources.cpus or (1 if gpus else whole)
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise ValueError(
            f"a run takes {cpus} cores and {gpus:g} GPUs, and no node of this Ray has as many; lower 'resources'"
        )
    return cpus, gpus


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"its worker died ({type(error).__name__}): {lines[0] if lines else 'no more is known'}"
