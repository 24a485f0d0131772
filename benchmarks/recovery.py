"""Recovery by training after pruning: half of each row is pruned by magnitude, then adapters are trained by each loss.

python benchmarks/recovery.py MODEL OUT --data text:valid.txt:0.6 --data text:c4.jsonl:0.25 --test test.txt
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

import laconic
from laconic.checkpoint.source import load_tokenizer
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text
from laconic.runtime.reading import load
from laconic.structure.anatomy import linears_of


@torch.no_grad()
def prune(model: str, sparsity: float, folder: Path) -> None:
    """Set the smallest weights of each row to zero, in every linear but the head."""
    opened = load(model)
    for name, linear in linears_of(opened).items():
        if name != "lm_head":
            W = linear.weight
            cut = W.abs().float().kthvalue(round(sparsity * W.shape[1]), dim=1, keepdim=True).values
            W[W.abs() <= cut] = 0
    opened.save_pretrained(folder)
    load_tokenizer(Path(model)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", action="append", required=True, metavar="FORMAT:FILE:WEIGHT")
    parser.add_argument("--test", required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--variants", default="lora:lm,lora:kl")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pruned = args.out / "pruned"
    if not pruned.exists():
        prune(args.model, args.sparsity, pruned)

    def measure(model: Path | str) -> dict[str, float]:
        result = evaluate_text(
            model,
            TextOptions(
                baseline=args.model, text=args.test, context_length=1024, windows=args.windows, dtype="float32"
            ),
        )
        return {key: result[key] for key in ("perplexity", "baseline_perplexity", "kl_mean")}

    before = measure(pruned)
    dense = before["baseline_perplexity"]
    print(json.dumps({"dense": dense, "pruned": before}), flush=True)
    data = [dict(zip(("format", "dataset", "weight"), d.split(":"), strict=True)) for d in args.data]
    for variant in args.variants.split(","):
        method, loss = variant.split(":")
        stage = {
            "method": method,
            "loss": loss,
            "teacher": args.model if loss == "kl" else None,
            "data": [d | {"weight": float(d["weight"])} for d in data],
            "max_steps": args.steps,
            "learning_rate": args.learning_rate,
            "batch_size": args.batch_size,
            "max_seq_length": args.length,
            "rank": args.rank,
            "alpha": 2 * args.rank,
            "precision": args.precision,
            "held_out_samples": 8,
            "eval_every": max(1, args.steps // 2),
        }
        start = time.monotonic()
        artifact = laconic.compress(str(pruned), {"stages": [stage]}, args.out / f"{method}-{loss}", overwrite=True)
        after = measure(artifact.path)
        # The share of the lost nats per token that training recovers.
        before_loss, after_loss = (math.log(q["perplexity"] / dense) for q in (before, after))
        row = {
            "variant": variant,
            **after,
            "recovered": 1 - after_loss / before_loss,
            "recovered_perplexity": (before["perplexity"] - after["perplexity"]) / (before["perplexity"] - dense),
            "seconds": round(time.monotonic() - start, 1),
            "held_out": artifact.results[f"training-{method}"]["held_out"],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
