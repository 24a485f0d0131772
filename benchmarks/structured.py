"""The table of structured pruning: perplexity and fidelity of one model with so many of its blocks' parameters gone.

    python benchmarks/structured.py MODEL --calibration TEXT --text TEXT [--stage YAML ...]

Prints Markdown. *Gone* counts parameters, of the whole model with its embeddings and head; the `sparsity` that a stage
is given is of what it targets. Everything is measured in float32 on the same windows; artifacts go to a temporary
folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

import laconic
from laconic.evaluate.run import evaluate

Stages = list[dict[str, Any]]
_PRUNER: dict[str, Any] = {"method": "llm_pruner"}
VARIANTS: list[dict[str, Any]] = [
    {"importance": "random"},
    {"importance": "weight"},
    {"importance": "first"},
    {"importance": "first", "aggregation": "vector"},
    {"importance": "second"},
    {"importance": "first", "uniform": True},
]


def rows() -> list[Stages]:
    """At 10, 20 and 30 %: each kind of importance, and whole blocks."""
    table: list[Stages] = []
    for sparsity in (0.1, 0.2, 0.3):
        table += [[{**_PRUNER, "sparsity": sparsity, **variant}] for variant in VARIANTS]
        table.append([{"method": "depth", "sparsity": sparsity}])
    return table


def told(stages: Stages) -> str:
    """A row's name: methods and their options."""
    return ", ".join(" ".join([s["method"], *(f"{k} {v}" for k, v in s.items() if k != "method")]) for s in stages)


def main() -> None:
    """Prune and measure row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--stage", action="append", metavar="YAML", help="a row of your own, in place of the table's")
    args = parser.parse_args()
    calibration = {
        "dataset": args.calibration,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.context_length,
    }
    print("| method | gone | perplexity | KL mean | KL p99 | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|")
    shown = False
    given = [yaml.safe_load(s) for s in args.stage or ()]
    for stages in [s if isinstance(s, list) else [s] for s in given] or rows():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "artifact"
            artifact = laconic.compress(args.model, {"calibration": calibration, "stages": stages}, out)
            result = evaluate(
                str(out),
                baseline=args.model,
                text=args.text,
                context_length=args.context_length,
                windows=args.windows,
                dtype="float32",
            )
            counts = artifact.results["pruning"]
            gone = 1 - counts["parameters_after"] / counts["parameters_before"]
            if not shown:
                print(f"| 16 bit | 0 % | {result['baseline_perplexity']:.3f} | 0 | 0 | 100 % |")
                shown = True
            print(
                f"| {told(stages)} | {100 * gone:.1f} % | {result['perplexity']:.3f} | {result['kl_mean']:.4f} "
                f"| {result['kl_p99']:.3f} | {100 * result['top1_agreement']:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
