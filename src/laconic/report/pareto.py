"""Sparsity, size, quality and speed of artifacts of one model: which of them no other beats in everything."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.report.figures import Quality, Speed, check_figures
from laconic.report.gathered import check_one_original, plain_name

ORIGINAL = "original"


@dataclass(frozen=True)
class Point:
    """An artifact as it was measured, or the original model.

    gone: the share of the original's linear weights that are zero or no more there. nbytes: of its weight files.
    perplexity, kl: on `text`; kl in nats a token, of the original to it. dense, sparse: tokens a second of decoding, as
    it is, and with sparse kernels, None where its zeros or the device have none. speed, sparse_speed: the same over the
    original's in the same run. prefill: over the original's, by the best kernels.
    """

    name: str
    gone: float
    nbytes: int
    perplexity: float
    kl: float
    dense: float
    speed: float
    sparse: float | None = None
    sparse_speed: float | None = None
    prefill: float = 1.0
    dominated: bool = False

    @property
    def best_speed(self) -> float:
        """By the better of the two kernels."""
        return max(self.speed, self.sparse_speed or 0.0)

    @property
    def costs(self) -> tuple[float, ...]:
        """What is compared, each the less the better: KL, bytes, time of a token."""
        return self.kl, float(self.nbytes), 1 / self.best_speed


def gather_points(folders: Sequence[Path]) -> tuple[list[Point], dict[str, Any]]:
    """Artifacts' points, the original's first, with domination found; and on what they were measured.

    Raises: ValueError for a folder that is no artifact, for results that are missing (which command to run), and for
    artifacts of different models, texts or devices.
    """
    found: dict[Path, tuple[dict[str, Any], dict[str, Any]]] = {}
    missing: list[str] = []
    bases: dict[Path, tuple[str | None, str]] = {}
    for folder in dict.fromkeys(folders):
        artifact, results = Artifact.measured(folder)
        quality = {n: r for n, r in results.items() if n.startswith("eval-") and r.get("kl_mean") is not None}
        # An artifact that was timed alone was compared with nothing.
        speed = {n: r for n, r in results.items() if n.startswith("bench-sparsity") and _beside(r.get("models"))}
        source = (artifact.recipe or {}).get("source") or {}
        known = [r.get("baseline") for r in (*quality.values(), *speed.values())]
        original = next((str(b) for b in known if b), source.get("model", "ORIGINAL"))
        if not quality:
            missing.append(f"laconic eval {folder} --baseline {original} --text FILE")
        if not speed:
            missing.append(f"laconic bench sparsity {folder} --baseline {original} --measure models")
        if quality and speed:
            (of_text, first), (of_speed, timed) = next(iter(quality.items())), next(iter(speed.items()))
            check_figures(folder / "results" / f"{of_text}.json", first, Quality, "laconic eval")
            check_figures(folder / "results" / f"{of_speed}.json", timed, Speed, "laconic bench sparsity")
            found[folder] = first, timed
            bases[folder] = source.get("sha256"), plain_name(original)
    if missing:
        raise ValueError(f"results are missing; run {'; '.join(missing)}")
    _check_same(found, bases)
    names = _names(list(found))
    points = [_point(names[folder], *results) for folder, results in found.items()]
    first, timed = next(iter(found.values()))
    points.insert(0, _original(first, timed))
    how = {
        "base": first["baseline"],
        "text": first["text"],
        "windows": first["windows"],
        "context_length": first["context_length"],
        "device_name": timed["device_name"],
        "threads": timed["threads"],
        "prompt": timed["prompt"],
        "sequences": timed["sequences"],
        "dtypes": sorted({r["dtype"] for pair in found.values() for r in pair}),
        "commands": list(dict.fromkeys(r["command"] for pair in found.values() for r in pair)),
    }
    beaten = dominated([p.costs for p in points])
    return [Point(**{**vars(p), "dominated": b}) for p, b in zip(points, beaten, strict=True)], how


def dominated(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Of each, whether another is no worse in everything and better in something. Equal ones do not beat each other."""
    beaten = [False] * len(costs)
    front: list[tuple[float, ...]] = []
    # In this order nothing can be beaten by what comes after it, and being beaten is passed on: the front is enough.
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        c = costs[i]
        beaten[i] = any(f != c and all(a <= b for a, b in zip(f, c, strict=True)) for f in front)
        if not beaten[i]:
            front.append(c)
    return beaten


def pareto_rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """Formatted cells by column."""
    return [
        {
            "artifact": p.name,
            "weights gone": f"{p.gone:.1%}",
            "size": f"{p.nbytes / 1e6:.2f} MB",
            "perplexity": f"{p.perplexity:.3f}",
            "KL": f"{p.kl:.4f}",
            "tokens/s, dense kernels": f"{p.dense:.4g} ({p.speed:.2f}x)",
            "tokens/s, sparse kernels": "none here" if p.sparse is None else f"{p.sparse:.4g} ({p.sparse_speed:.2f}x)",
            "prefill": f"{p.prefill:.2f}x",
            "": "dominated" if p.dominated else "",
        }
        for p in points
    ]


def pareto_caption(how: Mapping[str, Any]) -> str:
    """What was compared with what, and on what."""
    return (
        f"artifacts of {how['base']}; perplexity and KL on {how['text']}, {how['windows']} windows of "
        f"{how['context_length']} tokens; decoding of {how['sequences']} x 1 token after {how['prompt']} on "
        f"{how['device_name']}, {how['threads']} threads, {', '.join(how['dtypes'])}; x: over the original in the same "
        "run; dominated: another is no worse in KL, size and speed, and better in one"
    )


def as_csv(points: Sequence[Point]) -> str:
    """All numbers, unrounded."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(vars(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(p) for p in points)
    return file.getvalue()


def _beside(rows: Any) -> bool:
    """Whether a model was timed beside another."""
    return not isinstance(rows, list) or len(rows) > 1


def _point(name: str, quality: Mapping[str, Any], timed: Mapping[str, Any]) -> Point:
    _, ours, *fast = timed["models"]
    decode = ours["decode"]
    sparse = fast[0]["decode"] if fast else None
    return Point(
        name,
        ours["gone"],
        quality["file_bytes"],
        quality["perplexity"],
        quality["kl_mean"],
        decode["tokens_per_second"],
        decode["speedup"],
        sparse and sparse["tokens_per_second"],
        sparse and sparse["speedup"],
        max(row["prefill"]["speedup"] for row in (ours, *fast)),
    )


def _original(quality: Mapping[str, Any], timed: Mapping[str, Any]) -> Point:
    speed = timed["models"][0]["decode"]["tokens_per_second"]
    return Point(ORIGINAL, 0.0, quality["baseline_file_bytes"], quality["baseline_perplexity"], 0.0, speed, 1.0)


def _check_same(
    found: Mapping[Path, tuple[dict[str, Any], dict[str, Any]]], bases: Mapping[Path, tuple[str | None, str]]
) -> None:
    """What cannot be drawn in one picture."""
    check_one_original(bases)
    for part, keys, command in (
        (0, ("text", "context_length", "windows"), "laconic eval"),
        (1, ("device_name", "threads", "prompt", "sequences"), "laconic bench sparsity"),
    ):
        for key in keys:
            values = {folder: pair[part].get(key) for folder, pair in found.items()}
            if len(set(values.values())) > 1:
                said = ", ".join(f"{folder}: {value}" for folder, value in values.items())
                raise ValueError(f"these artifacts differ in '{key}' ({said}); run '{command}' on all of them alike")


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    short = {f: f.resolve().name for f in folders}
    return short if len(set(short.values())) == len(short) else {f: str(f) for f in folders}
