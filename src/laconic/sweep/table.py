"""The results of a study in one table: a row for each run and evaluation, a column for each axis."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from laconic.checkpoint.atomic import write_file
from laconic.sweep.runs import Run

# What a row has beside its axes, and of what kind it is.
_RUN: dict[str, Any] = {
    "run": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "original": pa.string(),
    "methods": pa.string(),
    "recipe_seed": pa.int64(),
    "artifact": pa.string(),
    "compress_seconds": pa.float64(),
    "peak_memory_bytes": pa.int64(),
}
_MEASURED: dict[str, Any] = {
    "text": pa.string(),
    "context_length": pa.int64(),
    "windows": pa.int64(),
    "tokens": pa.int64(),
    "chunk": pa.int64(),
    "kv_bits": pa.float64(),
    "dtype": pa.string(),
    "perplexity": pa.float64(),
    "nll_stderr": pa.float64(),
    "baseline_perplexity": pa.float64(),
    "kl_mean": pa.float64(),
    "kl_p99": pa.float64(),
    "top1_agreement": pa.float64(),
    "bits_per_weight": pa.float64(),
    "file_bytes": pa.int64(),
    "baseline_file_bytes": pa.int64(),
    "parameters": pa.int64(),
    "covered": pa.float64(),
    "simulated": pa.bool_(),
    "eval_seconds": pa.float64(),
    "command": pa.string(),
}


def rows_of(runs: Sequence[Run], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with what the axes chose under `values`; a run that failed, or was not reached, has no figures."""
    rows = []
    for run in runs:
        result = results.get(run.id, {"status": "not run"})
        made = result.get("compress") or {}
        row = {
            "run": run.id,
            "status": result["status"],
            "error": result.get("error"),
            "original": run.recipe.model,
            "methods": " + ".join(stage.method for stage in run.recipe.stages),
            "recipe_seed": run.recipe.seed,
            "artifact": result.get("artifact"),
            "compress_seconds": made.get("seconds"),
            "peak_memory_bytes": made.get("peak_memory_bytes"),
            "values": run.values,
        }
        for measured in result.get("evaluations") or [{}]:
            rows.append(row | {name: measured.get(name.removeprefix("eval_")) for name in _MEASURED})
    return rows


def fits(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what was measured is of the kinds that the table has."""
    try:
        for name, kind in (_RUN | _MEASURED).items():
            pa.array([row[name] for row in rows], kind)
    except (pa.ArrowException, OverflowError):
        return False
    return True


def write_table(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write rows as Parquet, whole or not at all. An axis whose values are of several kinds becomes JSON text."""
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in (_RUN | _MEASURED).items()}
    keys = dict.fromkeys(key for row in rows for key in row["values"])
    axes = {key: _column([row["values"].get(key) for row in rows]) for key in keys}
    ordered = {"run": columns.pop("run"), **axes, **columns}
    write_file(file, lambda to: pq.write_table(pa.table(ordered), to))


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int, float}:
        values, kinds = [None if v is None else float(v) for v in values], {float}
    if len(kinds) > 1:
        values = [None if v is None else json.dumps(v, default=str) for v in values]
    return pa.array(values, None if kinds else pa.string())
