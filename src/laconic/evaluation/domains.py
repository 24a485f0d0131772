"""`laconic eval domains`: the same measurements on several kinds of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.evaluation.bootstrap import describe_intervals
from laconic.evaluation.fidelity import observe
from laconic.evaluation.file_names import slug
from laconic.evaluation.models import describe_run, name_of_dtype, open_pair
from laconic.evaluation.options import DomainOptions
from laconic.evaluation.text import read_windows, summarize


def parse_domains(arguments: Sequence[str]) -> dict[str, str]:
    """Parse arguments of the form NAME=FILE into a mapping of names to texts.

    Args:
        arguments: Arguments, such as `web=c4.jsonl`.

    Returns:
        By name, the text: a file or a dataset of the Hub.

    Raises:
        ValueError: An argument has no name or no text, or a name occurs twice.
    """
    domains: dict[str, str] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name.strip() and equals and text.strip()):
            raise ValueError(f"{argument} is not NAME=FILE; write it as in web=c4.jsonl")
        if name.strip() in domains:
            raise ValueError(f"the domain '{name.strip()}' is named twice; give each another name")
        domains[name.strip()] = text.strip()
    return domains


def evaluate_domains(model: str | Path, options: DomainOptions) -> dict[str, Any]:
    """Measure perplexity, fidelity and calibration on each of several texts, with 95 % intervals over windows.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: The texts, the original and how to measure.

    Returns:
        The result, as it is saved in `results/` of an artifact.

    Raises:
        ValueError: An option does not fit the model, or a text cannot be read or is too short.
    """
    start = time.monotonic()
    pair = open_pair(model, options)
    # All texts are read first, so that a wrong file is reported before hours of measuring.
    windows = {name: read_windows(text, pair, options.windows) for name, text in options.domains.items()}
    rows: list[dict[str, Any]] = []
    for name, text in options.domains.items():
        observation = observe(pair.model, windows[name], pair.baseline)
        row: dict[str, Any] = {
            "domain": name,
            "text": text,
            "windows": len(windows[name]),
            "tokens": observation.quality().tokens,
        }
        row |= summarize(observation)
        if row["baseline_perplexity"]:
            row["perplexity_ratio"] = row["perplexity"] / row["baseline_perplexity"]
        rows.append(row)
    result: dict[str, Any] = {
        "model": str(model),
        "baseline": options.baseline,
        "domains": rows,
        "texts": dict(options.domains),
        # Ranked by KL: perplexities also differ because the texts do.
        "worst": max(rows, key=lambda row: row["kl_mean"])["domain"] if options.baseline else None,
        "context_length": pair.length,
        "stride": pair.length,
        "dtype": name_of_dtype(pair.model.dtype),
        "intervals": describe_intervals("windows"),
        **describe_run(pair, start),
    }
    artifact = Artifact(pair.folder)
    if artifact.recipe is not None:
        suffix = f"-{options.windows}" if options.windows else ""
        artifact.save_result(f"domains-{slug(options.domains)}-{pair.length}{suffix}", result)
    return result
