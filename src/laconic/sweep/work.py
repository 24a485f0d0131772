"""One run: compress, measure, remember. What goes wrong is remembered too, in one line."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.artifact.locks import wait_for_lock
from laconic.artifact.workspace import begun_with
from laconic.cards.writing import refresh_cards
from laconic.checkpoint.atomic import write_text
from laconic.pipeline.compression import compress
from laconic.pipeline.provenance import forget_peak_memory
from laconic.sweep.measure import measure
from laconic.sweep.runs import Run
from laconic.sweep.table import fits, rows_of

Report = Callable[[Mapping[str, Any]], None]
# Of a sweep's folder: first steps that runs have in common, by a hash of what each is made of.
STEPS = "steps"
LOCKS = "locks"


def work(run: Run, folder: Path, report: Report = lambda _: None) -> dict[str, Any]:
    """Make and measure the artifact of a run, and keep the result under `results/` of the sweep's folder.

    An artifact that is there is measured as it is; one that was begun is gone on with. Whatever fails is in the result,
    under `error`. A worker of a sweep that was killed may be at it for a moment yet, and is waited for. Returns the
    result.
    """
    with wait_for_lock(folder / LOCKS / run.id):
        result = read_result(run, folder)
        return result if result and result["status"] == "done" else _work(run, folder, report)


def _work(run: Run, folder: Path, report: Report) -> dict[str, Any]:
    begun = time.monotonic()
    counted = forget_peak_memory()
    try:
        artifact = _compress(run, folder, report)
        baseline = run.recipe.model if run.baseline else None
        measured = [measure(artifact.path, asked, baseline) for asked in run.evaluations]
        refresh_cards(artifact.path)
        made = dict(artifact.results["compress"])
    except Exception as e:
        return remember_failure(run, folder, e)
    if not counted:
        # Then it is that of the largest run before this one in the same process.
        made["peak_memory_bytes"] = None
    took = round(time.monotonic() - begun, 2)
    return _remember(run, folder, status="done", error=None, seconds=took, compress=made, evaluations=measured)


def remember_failure(run: Run, folder: Path, error: BaseException) -> dict[str, Any]:
    """Keep why a run failed; the next sweep tries it again. A defect of ours leaves its traceback as well."""
    said = " ".join(str(error).split())
    mended = isinstance(error, ValueError | OSError)
    line = said if mended and said else f"{type(error).__name__}: {said}"
    more = {} if mended else {"traceback": "".join(traceback.format_exception(error))}
    return _remember(run, folder, status="failed", error=line, **more)


def read_result(run: Run, folder: Path) -> dict[str, Any] | None:
    """The result of a run, if there is one. Raises: ValueError when the file is something else."""
    file = run.result(folder)
    try:
        result: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is corrupt; delete it, and the sweep measures that run again") from e
    if isinstance(result, dict) and result.get("run") == run.id:
        if result.get("status") == "failed" and isinstance(result.get("error"), str):
            return result
        if result.get("status") == "done" and _is_whole(run, result):
            return result
    raise ValueError(f"{file} is not the result of run {run.id}; delete it, and the sweep measures that run again")


def _is_whole(run: Run, result: Mapping[str, Any]) -> bool:
    """Whether a result has all that the table and a page take from it, which anyone may have changed."""
    measured, made = result.get("evaluations"), result.get("compress")
    return (
        isinstance(measured, list)
        and len(measured) == len(run.evaluations)
        and all(isinstance(m, dict) and m.get("text") and m.get("perplexity") is not None for m in measured)
        and isinstance(made, dict)
        and isinstance(result.get("values"), dict)
        and isinstance(result.get("seconds"), int | float)
        and fits(rows_of([run], {run.id: result}))
    )


def _compress(run: Run, folder: Path, report: Report) -> Artifact:
    target = run.artifact(folder)
    # A folder has its final name only once it is whole.
    if begun_with(target) and (target / "results" / "compress.json").is_file():
        return Artifact(target)
    if target.exists():
        raise ValueError(f"{target} is not the whole artifact of this run; move it away, and the sweep makes it again")
    return compress(recipe=run.recipe, output=target, steps=folder / STEPS, report=report)


def _remember(run: Run, folder: Path, **result: Any) -> dict[str, Any]:
    told = {
        "run": run.id,
        "values": run.values,
        "artifact": str(run.artifact(folder).relative_to(folder)),
        "recipe": run.recipe.model_dump(mode="json"),
        **result,
    }
    file = run.result(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(told, indent=2, default=str) + "\n")
    return told
