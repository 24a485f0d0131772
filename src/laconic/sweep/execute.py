"""Execute one run: compress, measure, and write the result, or the error in one line."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.artifact.identity import read_identity
from laconic.artifact.locks import wait_for_lock
from laconic.cards.writing import refresh_cards
from laconic.checkpoint.atomic import write_text
from laconic.pipeline.compression import compress
from laconic.pipeline.provenance import reset_peak_memory
from laconic.sweep.measure import measure
from laconic.sweep.runs import Run
from laconic.sweep.table import has_column_types, rows_of

Report = Callable[[Mapping[str, Any]], None]
# Folders within the folder of a sweep; STEPS holds first steps that several runs share, by a hash of their inputs.
STEPS = "steps"
LOCKS = "locks"


def execute(run: Run, folder: Path, report: Report = lambda _: None) -> dict[str, Any]:
    """Make and measure the artifact of a run, and write the result to `results/` in the folder of the sweep.

    A finished artifact is measured as it is; an interrupted compression continues. A worker of a killed sweep may
    still hold the run for a moment, so the run waits for its lock.

    Args:
        run: The run.
        folder: Folder of the sweep.
        report: Called with the events of the compression.

    Returns:
        The result; after a failure its `status` is `failed` and `error` holds the message.
    """
    with wait_for_lock(folder / LOCKS / run.id):
        result = read_result(run, folder)
        return result if result and result["status"] == "done" else _execute(run, folder, report)


def _execute(run: Run, folder: Path, report: Report) -> dict[str, Any]:
    start = time.monotonic()
    peak_was_reset = reset_peak_memory()
    try:
        artifact = _compress(run, folder, report)
        baseline = run.recipe.model if run.baseline else None
        evaluations = [measure(artifact.path, evaluation, baseline, trust=run.trust) for evaluation in run.evaluations]
        refresh_cards(artifact.path, trust=run.trust)
        compression = dict(artifact.results["compress"])
    except Exception as e:
        return record_failure(run, folder, e)
    if not peak_was_reset:
        # The peak is then that of the largest earlier run of this process.
        compression["peak_memory_bytes"] = None
    return _record(
        run,
        folder,
        status="done",
        error=None,
        seconds=round(time.monotonic() - start, 2),
        compress=compression,
        evaluations=evaluations,
    )


def start_event(run: Run) -> dict[str, Any]:
    """Return the event of a run that starts.

    Args:
        run: The run.
    """
    return {"event": "run", "run": run.id, "name": run.name, "state": "started"}


def record_failure(run: Run, folder: Path, error: BaseException) -> dict[str, Any]:
    """Write the result of a failed run; the next sweep retries it.

    Args:
        run: The run.
        folder: Folder of the sweep.
        error: Cause of the failure. Any type but ValueError and OSError is a defect of Laconic, and its traceback is
            written too.

    Returns:
        The result.
    """
    message = " ".join(str(error).split())
    is_user_error = isinstance(error, ValueError | OSError)
    line = message if is_user_error and message else f"{type(error).__name__}: {message}"
    details = {} if is_user_error else {"traceback": "".join(traceback.format_exception(error))}
    return _record(run, folder, status="failed", error=line, **details)


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    """Read the result of a run.

    Args:
        run: The run.
        folder: Folder of the sweep.

    Returns:
        The result; None if there is none.

    Raises:
        ValueError: The file is not a result of this run.
    """
    file = run.result(folder)
    try:
        result: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is corrupt; delete it, and the sweep repeats that run") from e
    if isinstance(result, dict) and result.get("run") == run.id:
        if result.get("status") == "failed" and isinstance(result.get("error"), str):
            return result
        if result.get("status") == "done" and _is_complete(run, result):
            return result
    raise ValueError(f"{file} is not the result of run {run.id}; delete it, and the sweep repeats that run")


def _is_complete(run: Run, result: Mapping[str, Any]) -> bool:
    """Return whether a result, which a user may have edited, has all that the table and the report read from it."""
    evaluations, compression = result.get("evaluations"), result.get("compress")
    return (
        isinstance(evaluations, list)
        and len(evaluations) == len(run.evaluations)
        and all(isinstance(e, dict) and e.get("text") and e.get("perplexity") is not None for e in evaluations)
        and isinstance(compression, dict)
        and isinstance(result.get("values"), dict)
        and isinstance(result.get("seconds"), int | float)
        and has_column_types(rows_of([run], {run.id: result}))
    )


def _compress(run: Run, folder: Path, report: Report) -> Artifact:
    target = run.artifact(folder)
    # A folder gets its final name only when it is complete.
    if read_identity(target) and (target / "results" / "compress.json").is_file():
        return Artifact(target)
    if target.exists():
        raise ValueError(f"{target} is not a complete artifact of this run; move it away, and the sweep makes it again")
    return compress(
        recipe=run.recipe,
        output=target,
        steps=folder / STEPS,
        report=report,
        trust=run.trust,
    )


def _record(run: Run, folder: Path, **result: Any) -> dict[str, Any]:
    record = {
        "run": run.id,
        "values": run.values,
        "artifact": str(run.artifact(folder).relative_to(folder)),
        "recipe": run.recipe.model_dump(mode="json"),
        **result,
    }
    file = run.result(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record, indent=2, default=str) + "\n")
    return record
