"""Pareto front of the artifacts of one model over KL, size and speed, with their sparsity."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.report.entries import check_one_original, plain_name, served_decoding
from laconic.report.result_schemas import EvaluationResult, ServingResult, SpeedResult, check_result

ORIGINAL = "original"


@dataclass(frozen=True)
class ParetoPoint:
    """Measurements of an artifact, or of the original model.

    Attributes:
        name: Name of the artifact.
        gone: Fraction of the original's linear weights that are zero or removed; None where only an engine was timed.
        nbytes: Bytes of the weight files.
        perplexity: Perplexity.
        kl: Mean KL divergence from the original, in nats per token.
        dense: Decoding speed with dense kernels, in tokens per second.
        speed: Decoding speed with dense kernels, relative to the original in the same run.
        sparse: Decoding speed with sparse kernels, in tokens per second; None without such kernels.
        sparse_speed: Decoding speed with sparse kernels, relative to the original in the same run.
        prefill: Prefill speed relative to the original, with the fastest kernels; None where only an engine was timed.
        dominated: Whether another artifact is no worse in all `costs`, and better in one.
    """

    name: str
    gone: float | None
    nbytes: int
    perplexity: float
    kl: float
    dense: float
    speed: float
    sparse: float | None = None
    sparse_speed: float | None = None
    prefill: float | None = 1.0
    dominated: bool = False

    @property
    def best_speed(self) -> float:
        """Relative decoding speed with the faster kernels."""
        return max(self.speed, self.sparse_speed or 0.0)

    @property
    def costs(self) -> tuple[float, ...]:
        """Costs to compare, lower is better: KL, bytes, time per token."""
        return self.kl, float(self.nbytes), 1 / self.best_speed


def gather_points(folders: Sequence[Path]) -> tuple[list[ParetoPoint], dict[str, Any]]:
    """Read the points of artifacts.

    Args:
        folders: Folders of artifacts with results of `laconic eval text --baseline`, and of `laconic bench serving` or
            `laconic bench sparsity`. All are compared by the former where every artifact has one.

    Returns:
        The points, with the original first, and the common settings of the measurements.

    Raises:
        ValueError: A folder is not an artifact, a result is missing (the message names the command), or the artifacts
            differ in model, text or device.
    """
    opened = {folder: Artifact.open_with_results(folder) for folder in dict.fromkeys(folders)}
    served = all(_serving(results) for _, results in opened.values())
    command = "laconic bench serving" if served else "laconic bench sparsity"
    measured: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
    missing: list[str] = []
    bases: dict[Path, tuple[str | None, str]] = {}
    for folder, (artifact, results) in opened.items():
        quality = {n: r for n, r in results.items() if n.startswith("eval-") and r.get("kl_mean") is not None}
        # A result with one model has no comparison with the original.
        benches = {n: r for n, r in results.items() if n.startswith("bench-sparsity")}
        speed = {n: r for n, r in benches.items() if _has_original(r.get("models"))}
        speed = _serving(results) if served else speed
        source = (artifact.recipe or {}).get("source") or {}
        baselines = [r.get("baseline") for r in (*quality.values(), *speed.values())]
        original = next((str(b) for b in baselines if b), source.get("model", "ORIGINAL"))
        if not quality:
            missing.append(f"laconic eval {folder} --baseline {original} --text FILE")
        if not speed:
            missing.append(f"laconic bench sparsity {folder} --baseline {original} --measure models")
        if quality and speed:
            (of_text, first), (of_speed, timed) = next(iter(quality.items())), next(iter(speed.items()))
            check_result(folder / "results" / f"{of_text}.json", first, EvaluationResult, "laconic eval")
            schema = ServingResult if served else SpeedResult
            check_result(folder / "results" / f"{of_speed}.json", timed, schema, command)
            measured[folder] = first, _as_timed(timed) if served else timed
            bases[folder] = source.get("sha256"), plain_name(original)
    if missing:
        raise ValueError(f"results are missing; run {'; '.join(missing)}")
    _check_settings(measured, bases, command)
    names = _names(list(measured))
    points = [_point(names[folder], *results) for folder, results in measured.items()]
    first, timed = next(iter(measured.values()))
    points.insert(0, _original(first, timed))
    flags = dominated([p.costs for p in points])
    return [replace(p, dominated=flag) for p, flag in zip(points, flags, strict=True)], _settings([*measured.values()])


def _settings(measured: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Return the common settings of pairs of results, of quality and of speed."""
    first, timed = measured[0]
    return {
        "base": first["baseline"],
        "text": first["text"],
        "windows": first["windows"],
        "context_length": first["context_length"],
        "device_name": timed["device_name"],
        "threads": timed["threads"],
        "prompt": timed["prompt"],
        "sequences": timed["sequences"],
        "dtypes": sorted({r["dtype"] for pair in measured for r in pair}),
        "commands": list(dict.fromkeys(r["command"] for pair in measured for r in pair)),
    }


def dominated(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Find dominated points.

    Args:
        costs: Costs of each point; lower is better.

    Returns:
        Whether another point is no worse in all costs and better in one. Equal points do not dominate each other.
    """
    flags = [False] * len(costs)
    front: list[tuple[float, ...]] = []
    # In sorted order no later point dominates an earlier one, and domination is transitive: the front is enough.
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        c = costs[i]
        flags[i] = any(f != c and all(a <= b for a, b in zip(f, c, strict=True)) for f in front)
        if not flags[i]:
            front.append(c)
    return flags


def pareto_rows(points: Sequence[ParetoPoint]) -> list[dict[str, str]]:
    """Return formatted cells by column.

    Args:
        points: Points of `gather_points`.
    """
    return [
        {
            "artifact": p.name,
            "weights removed": "-" if p.gone is None else f"{p.gone:.1%}",
            "size": f"{p.nbytes / 1e6:.2f} MB",
            "perplexity": f"{p.perplexity:.3f}",
            "KL": f"{p.kl:.4f}",
            "tokens/s, dense kernels": f"{p.dense:.4g} ({p.speed:.2f}x)",
            "tokens/s, sparse kernels": "not available"
            if p.sparse is None
            else f"{p.sparse:.4g} ({p.sparse_speed:.2f}x)",
            "prefill": "-" if p.prefill is None else f"{p.prefill:.2f}x",
            "": "dominated" if p.dominated else "",
        }
        for p in points
    ]


def pareto_caption(settings: Mapping[str, Any]) -> str:
    """Describe the settings of the measurements.

    Args:
        settings: Settings of `gather_points`.

    Returns:
        The description, without a period at its end.
    """
    model = f"{settings['base']}; perplexity and KL on {settings['text']}"
    windows = f"{settings['windows']} windows of {settings['context_length']} tokens"
    decoding = f"decoding of {settings['sequences']} x 1 token after {settings['prompt']}"
    threads = f"{settings['threads']} threads, " if settings["threads"] else ""
    device = f"{settings['device_name']}, {threads}{', '.join(settings['dtypes'])}"
    return (
        f"artifacts of {model}, {windows}; {decoding} on {device}; x: speed relative to the original in the same run; "
        "dominated: another is no worse in KL, size and speed, and better in one"
    )


def as_csv(points: Sequence[ParetoPoint]) -> str:
    """Return all numbers as CSV, unrounded, with one row per point.

    Args:
        points: Points of `gather_points`, at least one.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, list(vars(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(p) for p in points)
    return file.getvalue()


def _serving(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results of `laconic bench serving` that compare with the original."""
    return {n: r for n, r in results.items() if n.startswith("bench-serving") and r.get("baseline")}


def _as_timed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result of `laconic bench serving` with the keys of one of `laconic bench sparsity`."""
    decode = served_decoding(result)
    if decode is None:
        raise ValueError(
            f"{result['model']} has no speed in an engine beside the original; run {result['command']} again"
        )
    rate = decode["tokens_per_second"]
    original = {"tokens_per_second": rate / decode["speedup"], "speedup": 1.0}
    rows = [{"gone": None, "decode": d, "prefill": {"speedup": None}} for d in (original, decode)]
    engine = f"{result['engine']} {result['engine_version']}"
    return {
        **result,
        "models": rows,
        "device_name": f"{result['device_name']}, {engine}",
        "threads": None,
        "prompt": min(result["prompts"]),
        "sequences": min(result["batches"]),
        "dtype": next(m["dtype"] for m in result["models"]),
    }


def _has_original(rows: Any) -> bool:
    """Return whether a result has more than one model; malformed rows pass, and fail in `check_result`."""
    return not isinstance(rows, list) or len(rows) > 1


def _point(name: str, quality: Mapping[str, Any], timed: Mapping[str, Any]) -> ParetoPoint:
    _, with_dense, *with_sparse = timed["models"]
    decode = with_dense["decode"]
    sparse = with_sparse[0]["decode"] if with_sparse else None
    return ParetoPoint(
        name=name,
        gone=with_dense["gone"],
        nbytes=quality["file_bytes"],
        perplexity=quality["perplexity"],
        kl=quality["kl_mean"],
        dense=decode["tokens_per_second"],
        speed=decode["speedup"],
        sparse=sparse and sparse["tokens_per_second"],
        sparse_speed=sparse and sparse["speedup"],
        prefill=max((s for row in (with_dense, *with_sparse) if (s := row["prefill"]["speedup"])), default=None),
    )


def _original(quality: Mapping[str, Any], timed: Mapping[str, Any]) -> ParetoPoint:
    speed = timed["models"][0]["decode"]["tokens_per_second"]
    return ParetoPoint(ORIGINAL, 0.0, quality["baseline_file_bytes"], quality["baseline_perplexity"], 0.0, speed, 1.0)


def _check_settings(
    measured: Mapping[Path, tuple[dict[str, Any], dict[str, Any]]],
    bases: Mapping[Path, tuple[str | None, str]],
    speed_command: str,
) -> None:
    """Check that all artifacts have the same original and the same settings, so that one chart can compare them."""
    check_one_original(bases)
    for part, keys, command in (
        (0, ("text", "context_length", "windows"), "laconic eval"),
        (1, ("device_name", "threads", "prompt", "sequences"), speed_command),
    ):
        for key in keys:
            values = {folder: pair[part].get(key) for folder, pair in measured.items()}
            if len(set(values.values())) > 1:
                pairs = ", ".join(f"{folder}: {value}" for folder, value in values.items())
                raise ValueError(f"these artifacts differ in '{key}' ({pairs}); run '{command}' with one value for all")


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    short = {f: f.resolve().name for f in folders}
    return short if len(set(short.values())) == len(short) else {f: str(f) for f in folders}
