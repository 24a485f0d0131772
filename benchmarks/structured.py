"""Table of structured pruning: perplexity and fidelity of one model by the share of removed parameters.

    python benchmarks/structured.py MODEL --calibration TEXT --text TEXT [--stage YAML ...] [--then YAML]

Prints Markdown. *Removed* is the share of all parameters, embeddings and head included; the `sparsity` of a stage is a
share of what it targets. Everything is measured in float32 on the same windows; artifacts go to a temporary
folder.
"""

from __future__ import annotations

from typing import Any

from rows import Stages, cells, describe, later_stages, measure, options, parse_stages

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
    """Return the rows: each kind of importance, and whole blocks, at 10, 20 and 30 %."""
    table: list[Stages] = []
    for sparsity in (0.1, 0.2, 0.3):
        table += [[{**_PRUNER, "sparsity": sparsity, **variant}] for variant in VARIANTS]
        table.append([{"method": "depth", "sparsity": sparsity}])
    return table


def main() -> None:
    """Prune and measure row by row."""
    parser = options(__doc__)
    parser.add_argument("--stage", action="append", metavar="YAML", help="a row in place of the table's")
    args = parser.parse_args()
    print("| method | removed | perplexity | KL mean | KL p99 | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|")
    has_baseline = False
    for stages in [parse_stages(s) for s in args.stage or ()] or rows():
        r = measure(args, stages)
        removed = 1 - r["pruning"]["parameters_after"] / r["pruning"]["parameters_before"]
        if not has_baseline:
            print(f"| 16 bit | 0 % | {r['baseline_perplexity']:.3f} | 0 | 0 | 100 % |")
            has_baseline = True
        print(f"| {describe(stages)}{later_stages(args)} | {100 * removed:.1f} % | {cells(r)} |", flush=True)


if __name__ == "__main__":
    main()
