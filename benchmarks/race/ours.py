"""Run Laconic on a job, as peer.py runs the others.

Laconic loads, compresses and writes block by block. The time of writing shards is reported separately, as saving is for
the others; loading is part of the compression time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from laconic.artifact.workspace import Workspace
from laconic.pipeline.compression import prepare, run

STAGES: dict[str, list[dict[str, Any]]] = {
    "gptq": [{"method": "gptq", "scheme": "W4A16"}],
    "awq": [{"method": "awq", "scheme": "W4A16_ASYM"}],
    "smoothquant-rtn": [{"method": "smoothquant", "alpha": 0.5}, {"method": "rtn", "scheme": "W8A8"}],
    "smoothquant-gptq": [{"method": "smoothquant", "alpha": 0.5}, {"method": "gptq", "scheme": "W8A8"}],
    "autoround": [{"method": "autoround", "scheme": "W4A16"}],
}


def main() -> None:
    """Compress a model and time it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    windows = load_file(job["tokens"])["input_ids"]
    stages = [dict(s) for s in STAGES[job["case"]]]
    if "W4" in stages[-1]["scheme"]:
        stages[-1]["group_size"] = job["group_size"]
    if job["case"] == "autoround":
        stages[-1]["iters"] = job["iters"]
    samples, length = windows.shape
    # The text only has to pass the checks; its windows are replaced.
    recipe = {
        "stages": stages,
        "calibration": {"dataset": job["text"], "num_calibration_samples": samples, "max_seq_length": length},
    }
    start = time.monotonic()
    prepared = replace(prepare(job["model"], recipe, job["output"]), windows=windows)
    load = time.monotonic() - start
    writing = time_writing()
    start = time.monotonic()
    run(prepared)
    seconds, save = time.monotonic() - start, sum(writing)
    print(
        "RESULT " + json.dumps({"version": version("laconic"), "load": load, "compress": seconds - save, "save": save})
    )


def time_writing() -> list[float]:
    """Time the writing of every shard; return a list to which the seconds are appended."""
    seconds: list[float] = []
    write = Workspace.write_shard

    def write_timed(self: Workspace, *args: Any) -> None:
        start = time.monotonic()
        write(self, *args)
        seconds.append(time.monotonic() - start)

    Workspace.write_shard = write_timed  # type: ignore[method-assign]
    return seconds


if __name__ == "__main__":
    main()
