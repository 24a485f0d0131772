"""Table of pruning methods by sparsity: perplexity, fidelity and time for one model.

    python benchmarks/pruning.py MODEL --calibration TEXT --text TEXT [--sparsities 0.5 2:4 ...] [--methods NAME ...]
        [--then YAML]

Prints Markdown. Everything is measured in float32 on the same windows; artifacts go to a temporary folder.
"""

from __future__ import annotations

from typing import Any

from rows import Stages, cells, later_stages, measure, options

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "wanda, update": {"method": "wanda", "update": True},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt, actorder": {"method": "sparsegpt", "actorder": "weight"},
    "sparsegpt, update": {"method": "sparsegpt", "update": True},
    "wanda, owl": {"method": "wanda", "allocation": "owl"},
    "sparsegpt, owl": {"method": "sparsegpt", "allocation": "owl"},
    "wanda, search": {"method": "wanda", "allocation": "search"},
    "sparsegpt, search": {"method": "sparsegpt", "allocation": "search"},
    "wanda, update, search": {"method": "wanda", "update": True, "allocation": "search"},
    "gptq, at once": {"method": "gptq", "scheme": "W4A16"},
    "sparsegpt, then gptq": {"method": "sparsegpt"},
}


def stages_of(method: str, sparsity: str, group_size: int | None) -> Stages | None:
    """Return the stages of a row; None for N:M structures with an allocation, which they do not allow."""
    structured = ":" in sparsity
    if structured and "allocation" in METHODS[method]:
        return None
    share = {"mask_structure": sparsity} if structured else {"sparsity": float(sparsity)}
    rounding = {"method": "gptq", "scheme": "W4A16"} | ({"group_size": group_size} if group_size else {})
    stage = (rounding if METHODS[method]["method"] == "gptq" else METHODS[method]) | share
    return [stage, rounding] if method.endswith("then gptq") else [stage]


def main() -> None:
    """Compress and measure row by row."""
    parser = options(__doc__)
    parser.add_argument("--group-size", type=int, default=None, help="group size of 4-bit codes")
    parser.add_argument("--sparsities", nargs="+", default=["0.3", "0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if "gptq" not in m])
    args = parser.parse_args()
    print("| sparsity | method | perplexity | KL mean | KL p99 | same top-1 | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    has_baseline = False
    for sparsity in args.sparsities:
        for method in args.methods:
            stages = stages_of(method, sparsity, args.group_size)
            if stages is None:
                continue
            r = measure(args, stages)
            if not has_baseline:
                print(f"| 0 | - | {r['baseline_perplexity']:.3f} | 0 | 0 | 100 % | - |")
                has_baseline = True
            print(
                f"| {sparsity} | {method}{later_stages(args)} | {cells(r)} | {r['compress_seconds']:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
