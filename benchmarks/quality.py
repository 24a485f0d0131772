"""Table of methods by scheme: perplexity, fidelity and size of one model.

    python benchmarks/quality.py MODEL --calibration TEXT --text TEXT [--schemes ...] [--methods ...]
        [--stage YAML] [--then YAML]

Prints Markdown. Everything is measured in float32 on the same windows; artifacts go to a temporary folder.
"""

from __future__ import annotations

from typing import Any

from rows import Stages, cells, describe, later_stages, measure, options, parse_stages

METHODS: dict[str, Stages] = {
    "rtn (min-max)": [{"method": "rtn"}],
    "rtn (mse)": [{"method": "rtn", "observer": "mse"}],
    "awq": [{"method": "awq"}],
    "gptq": [{"method": "gptq"}],
    "gptq (GPTAQ)": [{"method": "gptq", "asymmetric_calibration": 1.0}],
    "autoround": [{"method": "autoround"}],
    "zeroquant": [{"method": "zeroquant"}],
    "smoothquant, rtn": [{"method": "smoothquant"}, {"method": "rtn"}],
    "smoothquant (search), rtn": [{"method": "smoothquant", "alpha": "search"}, {"method": "rtn"}],
}
WEIGHT_ONLY = {
    "W8A16": {"scheme": "W8A16"},
    "W4A16": {"scheme": "W4A16"},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM"},
    "W3A16 asym": {"scheme": "W3A16", "symmetric": False},
    "W2A16 asym": {"scheme": "W2A16", "symmetric": False},
    "NVFP4A16": {"scheme": "NVFP4A16"},
    "MXFP4A16": {"scheme": "MXFP4A16"},
}
WITH_ACTIVATIONS = {
    "W8A8": {"scheme": "W8A8"},
    "W8A8 static": {"scheme": "W8A8", "dynamic": False},
    "W4A8": {"scheme": "W4A8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "NVFP4": {"scheme": "NVFP4"},
    "MXFP4": {"scheme": "MXFP4"},
    "W7A7": {"scheme": "W7A7"},
    "W6A6": {"scheme": "W6A6"},
    "W4A4": {"scheme": "W4A4"},
}
# Schemes to which --group-size applies.
GROUPED = ("W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W4A8", "W4A4")


def rows(quick: bool, schemes: list[str] | None, methods: list[str] | None) -> list[tuple[str, str, Stages]]:
    """Return (scheme, method, stages) of every row; only of these schemes and methods, if they are given."""
    table = [(s, m) for s in WEIGHT_ONLY for m in _weight_methods(s)]
    if not quick:
        table += [(s, m) for s in WITH_ACTIVATIONS for m in _activation_methods(s)]
    keys = WEIGHT_ONLY | WITH_ACTIVATIONS
    return [
        (s, m, _with(METHODS[m], keys[s])) for s, m in table if s in (schemes or keys) and m in (methods or METHODS)
    ]


def _weight_methods(scheme: str) -> list[str]:
    if scheme == "W8A16":
        return ["rtn (mse)"]
    tuned = ["autoround"] if "FP4" not in scheme else []
    return ["rtn (min-max)", "rtn (mse)", "awq", "gptq", "gptq (GPTAQ)", *tuned]


def _activation_methods(scheme: str) -> list[str]:
    smooth = ["smoothquant, rtn", "smoothquant (search), rtn"] if scheme[:4] in ("W8A8", "W7A7", "W6A6") else []
    return ["rtn (min-max)", "gptq", *smooth, *(["zeroquant"] if scheme == "W4A8" else [])]


def _with(stages: Stages, keys: dict[str, Any]) -> Stages:
    """Add keys to the last stage, which quantizes."""
    return [*stages[:-1], keys | stages[-1]]


def custom_row(text: str) -> tuple[str, str, Stages]:
    """Return the row of a stage, or of a list of stages, in YAML."""
    stages = parse_stages(text)
    return stages[-1].get("scheme", "W8A8"), describe(stages, "scheme"), stages


def main() -> None:
    """Compress and measure row by row."""
    parser = options(__doc__)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--group-size-for", nargs=2, action="append", metavar=("PATTERN", "SIZE"), default=[])
    parser.add_argument("--stage", action="append", metavar="YAML", help="a row in place of the table's")
    parser.add_argument("--quick", action="store_true", help="weight-only schemes only")
    parser.add_argument("--schemes", nargs="+", choices=[*WEIGHT_ONLY, *WITH_ACTIVATIONS], help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    args = parser.parse_args()
    print("| scheme | method | bits/weight | perplexity | KL mean | KL p99 | same top-1 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    has_baseline = False
    custom = [custom_row(s) for s in args.stage or ()]
    for scheme, method, stages in custom or rows(args.quick, args.schemes, args.methods):
        if args.group_size and scheme in GROUPED:
            last = stages[-1] | {"group_size": args.group_size}
            others = [last | {"targets": p, "group_size": int(g)} for p, g in args.group_size_for]
            stages = [*stages[:-1], last | {"ignore": ["lm_head", *(p for p, _ in args.group_size_for)]}, *others]
        r = measure(args, stages)
        if not has_baseline:
            print(
                f"| 16 bit | - | {r['baseline_bits_per_weight']:.2f} | {r['baseline_perplexity']:.3f} | 0 | 0 | 100 % |"
            )
            has_baseline = True
        simulated = " (simulated)" if r["simulated"] else ""
        print(
            f"| {scheme}{simulated} | {method}{later_stages(args)} | {r['bits_per_weight']:.2f} | {cells(r)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
