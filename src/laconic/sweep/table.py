"""The table of a study, `results.parquet`: one row per run and evaluation, one column per axis."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from laconic.checkpoint.atomic import write_file
from laconic.sweep.runs import Run

# Columns beside those of the axes.
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
    """Build the rows of the table.

    Args:
        runs: The runs, in the order of the rows.
        results: Results by run id; a run without one has the status `not run`.

    Returns:
        One row per run and evaluation, with the axis values under `values`. Rows of failed and missing runs have None
        for every measurement.
    """
    rows = []
    for run in runs:
        result = results.get(run.id, {"status": "not run"})
        compression = result.get("compress") or {}
        row = {
            "run": run.id,
            "status": result["status"],
            "error": result.get("error"),
            "original": run.recipe.model,
            "methods": " + ".join(stage.method for stage in run.recipe.stages),
            "recipe_seed": run.recipe.seed,
            "artifact": result.get("artifact"),
            "compress_seconds": compression.get("seconds"),
            "peak_memory_bytes": compression.get("peak_memory_bytes"),
            "values": run.values,
        }
        for evaluation in result.get("evaluations") or [{}]:
            rows.append(row | {name: evaluation.get(name.removeprefix("eval_")) for name in _MEASURED})
    return rows


def has_column_types(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the values of all rows have the types of their columns.

    Args:
        rows: Rows of `rows_of`.
    """
    try:
        for name, dtype in (_RUN | _MEASURED).items():
            pa.array([row[name] for row in rows], dtype)
    except (pa.ArrowException, OverflowError):
        return False
    return True


def write_table(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write rows to a Parquet file, atomically.

    Args:
        rows: Rows of `rows_of`. An axis with values of several types becomes a column of JSON text.
        file: The Parquet file.
    """
    columns = {name: pa.array([row[name] for row in rows], dtype) for name, dtype in (_RUN | _MEASURED).items()}
    keys = dict.fromkeys(key for row in rows for key in row["values"])
    axes = {key: _column([row["values"].get(key) for row in rows]) for key in keys}
    ordered = {"run": columns.pop("run"), **axes, **columns}
    write_file(file, lambda path: pq.write_table(pa.table(ordered), path))


def _column(values: list[Any]) -> pa.Array:
    types = {type(v) for v in values if v is not None}
    if types == {int, float}:
        values, types = [None if v is None else float(v) for v in values], {float}
    if len(types) > 1:
        values = [None if v is None else json.dumps(v, default=str) for v in values]
    return pa.array(values, None if types else pa.string())
