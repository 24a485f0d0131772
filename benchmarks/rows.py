"""Shared code of the tables of methods: options, and the measurement of a row, in float32 on the same windows."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import laconic
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text

Stages = list[dict[str, Any]]


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the model and of the texts for calibration and measurement."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument(
        "--then", type=parse_stages, default=[], metavar="YAML", help="stages to append to each row, such as `lora`"
    )
    return parser


def parse_stages(text: str) -> Stages:
    """Parse YAML of a stage or of a list of stages."""
    parsed = yaml.safe_load(text)
    return parsed if isinstance(parsed, list) else [parsed]


def describe(stages: Stages, *omitted: str) -> str:
    """Return the name of a row: methods and their options, without omitted options, which have another column."""
    words = [[s["method"], *(f"{k} {v}" for k, v in s.items() if k not in ("method", *omitted))] for s in stages]
    return ", ".join(" ".join(w) for w in words)


def later_stages(args: argparse.Namespace) -> str:
    """Return the end of a row's name for the stages of `--then`."""
    return "".join(f", {stage['method']}" for stage in args.then)


def measure(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    """Compress and evaluate a model with the stages of a row and of `--then`; the artifact is deleted.

    Returns:
        The result of the evaluation, with `compress_seconds` and `pruning`.
    """
    calibration = {
        "dataset": args.calibration,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.context_length,
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        recipe = {"stages": [*stages, *args.then], "calibration": calibration}
        artifact = laconic.compress(args.model, recipe, Path(folder) / "artifact")
        seconds = time.monotonic() - start
        result = evaluate_text(
            artifact.path,
            TextOptions(
                baseline=args.model,
                text=args.text,
                context_length=args.context_length,
                windows=args.windows,
                dtype="float32",
            ),
        )
        return {**result, "compress_seconds": seconds, "pruning": artifact.results.get("pruning")}


def cells(r: dict[str, Any]) -> str:
    """Return the cells of perplexity, KL and agreement, which all tables have."""
    return f"{r['perplexity']:.3f} | {r['kl_mean']:.4f} | {r['kl_p99']:.3f} | {100 * r['top1_agreement']:.1f} %"
