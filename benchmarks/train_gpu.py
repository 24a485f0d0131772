"""Recovery of a random model of a billion parameters on one GPU, on copies on several, and cut among them (FSDP).

    python benchmarks/train_gpu.py FOLDER --text TEXT [--gpus 2] [--steps 20]

Each way is a launch of its own of `laconic compress` with one `lora` stage, of as many sequences a step in all; printed
are target tokens a second over the training alone, the peak memory of each GPU, and the losses. Returns 1 where a way
fails, or where a loss is more than one per cent from that of one GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_machines", "1"]


def main() -> int:
    """Make the model, train it each way, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "models" / "demo")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--steps", type=int, default=20, help="at least 5, of which the first are not timed")
    parser.add_argument("--layers", type=int, default=22)
    args = parser.parse_args()
    if args.steps < 5:
        parser.error("--steps: at least 5, of which the first are not timed")
    if args.gpus > 1 and 8 % args.gpus:
        parser.error(f"--gpus: a step's 8 sequences cannot be shared evenly by {args.gpus}")
    model = make_model(args.folder / "model", args.tokenizer, args.layers)
    ways = {"one GPU": (1, [])}
    if args.gpus > 1:
        several = ["--num_processes", str(args.gpus), "--multi_gpu"]
        cut = ["--num_processes", str(args.gpus), "--use_fsdp", "--fsdp_version", "2"]
        ways |= {f"copies on {args.gpus}": (args.gpus, several), f"cut among {args.gpus}": (args.gpus, cut)}
    print("| way | tokens/s | s a step | peak GB of each | first loss | last loss |")
    print("|---|---:|---:|---:|---:|---:|")
    found: list[list[float]] = []
    for way, (count, launch) in ways.items():
        row, losses = train(model, args, way, count, launch)
        print(row, flush=True)
        found.append(losses)
    agree = all(math.isclose(a, b, rel_tol=0.01) for own in found for a, b in zip(own, found[0], strict=False))
    print("\nlosses agree" if agree and all(found) else "\nlosses do NOT agree, or a way failed")
    return int(not (agree and all(found)))


def make_model(folder: Path, tokenizer: Path, layers: int) -> Path:
    """A random Llama, 1.1 billion parameters with 22 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=json.loads((tokenizer / "config.json").read_text())["vocab_size"],
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = LlamaForCausalLM(config)
        made.to("cpu", torch.bfloat16).save_pretrained(folder)
        for file in tokenizer.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def train(model: Path, args: argparse.Namespace, way: str, count: int, launch: list[str]) -> tuple[str, list[float]]:
    """One launch. Returns: its row, and its first and last loss; none where it failed."""
    output = args.folder / way.replace(" ", "-")
    stage = {
        "method": "lora",
        "data": [{"dataset": str(Path(args.text).absolute())}],
        "max_steps": args.steps,
        "batch_size": 8 // count,
        "max_seq_length": 1024,
        "held_out_samples": 8,
        "eval_every": args.steps,
        "gradient_checkpointing": True,
    }
    recipe = args.folder / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(model), "stages": [stage]}))
    worker = [str(Path(__file__).absolute()), "--worker", str(recipe), str(output)]
    command = [*LAUNCH, *launch, *worker] if launch else [sys.executable, *worker]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    peaks = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("PEAK ")]
    result = output / "results" / "training-lora.json"
    if run.returncode or not result.exists():
        said = args.folder / f"{output.name}.log"
        said.write_text(run.stdout + run.stderr)
        errors = [line for line in run.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        return f"| {way} | failed, see {said}: {(errors or ['it said nothing'])[0][:300]} |", []
    told = json.loads(result.read_text())
    times = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("STEP ")]
    # The first steps meet cold caches.
    seconds = (times[-1] - times[2]) / (len(times) - 3)
    tokens = sum(step["tokens"] for step in told["curve"]) / len(told["curve"])
    first, last = (told["curve"][i]["loss"] for i in (0, -1))
    row = f"| {way} | {tokens / seconds:.0f} | {seconds:.3f} | {', '.join(peaks)} | {first:.4f} | {last:.4f} |"
    return row, [first, last]


def worker(recipe: str, output: str) -> None:
    """What each process of a launch does."""
    from laconic.pipeline.compression import compress

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "train" and os.environ.get("RANK", "0") == "0":
            print(f"STEP {time.monotonic()}", flush=True)

    try:
        compress(recipe=json.loads(Path(recipe).read_text()), output=output, overwrite=True, report=watch)
    finally:
        if torch.cuda.is_available():
            print(f"PEAK {torch.cuda.max_memory_allocated() / 1e9:.2f} {os.environ.get('LOCAL_RANK', '0')}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main())
