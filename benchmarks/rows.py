"""What the tables of methods share: their options, and how a row is measured, in float32 on the same windows."""

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
    """The model, and the texts that it is calibrated and measured on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument(
        "--then", type=given_stages, default=[], metavar="YAML", help="stages that come after each row's own, as `lora`"
    )
    return parser


def given_stages(text: str) -> Stages:
    """The stages of a row of the user's own, YAML of one or of a list."""
    given = yaml.safe_load(text)
    return given if isinstance(given, list) else [given]


def told(stages: Stages, *unsaid: str) -> str:
    """A row's name: methods and their options. unsaid: options that another column has."""
    words = [[s["method"], *(f"{k} {v}" for k, v in s.items() if k not in ("method", *unsaid))] for s in stages]
    return ", ".join(" ".join(w) for w in words)


def afterwards(args: argparse.Namespace) -> str:
    """What a row's name ends in for the stages that come after its own."""
    return "".join(f", {stage['method']}" for stage in args.then)


def measured(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    """What `laconic eval` says of the artifact of a row's stages and those of `--then`, with `compress_seconds` and
    `pruning`; the artifact is not kept."""
    calibration = {
        "dataset": args.calibration,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.context_length,
    }
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        recipe = {"stages": [*stages, *args.then], "calibration": calibration}
        artifact = laconic.compress(args.model, recipe, Path(folder) / "artifact")
        seconds = time.monotonic() - begun
        found = evaluate_text(
            artifact.path,
            TextOptions(
                baseline=args.model,
                text=args.text,
                context_length=args.context_length,
                windows=args.windows,
                dtype="float32",
            ),
        )
        return {**found, "compress_seconds": seconds, "pruning": artifact.results.get("pruning")}


def cells(r: dict[str, Any]) -> str:
    """Perplexity, KL and agreement, as every table ends or goes on."""
    return f"{r['perplexity']:.3f} | {r['kl_mean']:.4f} | {r['kl_p99']:.3f} | {100 * r['top1_agreement']:.1f} %"
