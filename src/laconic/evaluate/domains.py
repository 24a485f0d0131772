"""`laconic eval --domain NAME=FILE`: what compression costs on one kind of text and on another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.evaluate.bootstrap import SEED, method_of
from laconic.evaluate.fidelity import observe
from laconic.evaluate.names import slug
from laconic.evaluate.run import figures, open_pair, windows_of
from laconic.pipeline.provenance import command_line, versions


def read_domains(asked: Sequence[str]) -> dict[str, str]:
    """By name, the texts of `--domain NAME=FILE`. Raises: ValueError for one without a name or text, or named twice."""
    found: dict[str, str] = {}
    for given in asked:
        name, equals, text = given.partition("=")
        if not (name.strip() and equals and text.strip()):
            raise ValueError(f"--domain {given} is no NAME=FILE; write it as in --domain web=c4.jsonl")
        if name.strip() in found:
            raise ValueError(f"--domain names '{name.strip()}' twice; give each domain another name")
        found[name.strip()] = text.strip()
    return found


def evaluate_domains(
    model: str | Path,
    domains: Mapping[str, str],
    *,
    baseline: str | None = None,
    context_length: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity, fidelity and calibration on each of several texts, with 95 % intervals over resampled windows.

    domains: by name, a text as `evaluate` takes it. windows: at most so many of each. The rest as there.

    Returns what is written to `results/` of the artifact. Raises: ValueError for what the caller can mend.
    """
    if not domains:
        raise ValueError("no domain is named; give some, as in --domain web=c4.jsonl")
    begun = time.monotonic()
    opened = open_pair(model, baseline, context_length=context_length, dtype=dtype, device=device)
    # Every text is read before any is measured, so that what is wrong is said now rather than in an hour.
    ids = {name: windows_of(text, opened, windows) for name, text in domains.items()}
    rows = []
    for name, text in domains.items():
        seen = observe(opened.ours, ids[name], opened.theirs)
        measured = figures(seen)
        row = {"domain": name, "text": text, "windows": len(ids[name]), "tokens": seen.quality().tokens, **measured}
        if measured["baseline_perplexity"]:
            row["perplexity_ratio"] = measured["perplexity"] / measured["baseline_perplexity"]
        rows.append(row)
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": baseline,
        "domains": rows,
        "texts": dict(domains),
        # Where most of the original is lost; perplexities themselves differ as the texts do.
        "worst": max(rows, key=lambda r: r["kl_mean"])["domain"] if baseline else None,
        "context_length": opened.length,
        "stride": opened.length,
        "dtype": str(opened.ours.dtype).removeprefix("torch."),
        "intervals": method_of("windows"),
        "seconds": round(time.monotonic() - begun, 2),
        "device": opened.place,
        "seed": SEED,
        "command": command_line(),
        "versions": versions(),
    }
    artifact = Artifact(opened.folder)
    if artifact.recipe is not None:
        artifact.save_result(f"domains-{slug(domains)}-{opened.length}" + (f"-{windows}" if windows else ""), result)
    return result
