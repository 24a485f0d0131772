"""The table of structured pruning: perplexity and fidelity of one model with so many of its blocks' parameters gone.

    python benchmarks/structured.py MODEL --calibration TEXT --text TEXT [--stage YAML ...] [--then YAML]

Prints Markdown. *Gone* counts parameters, of the whole model with its embeddings and head; the `sparsity` that a stage
is given is of what it targets. Everything is measured in float32 on the same windows; artifacts go to a temporary
folder.
"""

from __future__ import annotations

from typing import Any

from rows import Stages, afterwards, cells, given_stages, measured, options, told

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


def main() -> None:
    """Prune and measure row by row."""
    parser = options(__doc__)
    parser.add_argument("--stage", action="append", metavar="YAML", help="a row of your own, in place of the table's")
    args = parser.parse_args()
    print("| method | gone | perplexity | KL mean | KL p99 | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|")
    shown = False
    for stages in [given_stages(s) for s in args.stage or ()] or rows():
        r = measured(args, stages)
        gone = 1 - r["pruning"]["parameters_after"] / r["pruning"]["parameters_before"]
        if not shown:
            print(f"| 16 bit | 0 % | {r['baseline_perplexity']:.3f} | 0 | 0 | 100 % |")
            shown = True
        print(f"| {told(stages)}{afterwards(args)} | {100 * gone:.1f} % | {cells(r)} |", flush=True)


if __name__ == "__main__":
    main()
