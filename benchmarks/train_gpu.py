"""Recovery training of a random model of a billion parameters on one GPU, and on several with DDP and FSDP.

    python benchmarks/train_gpu.py FOLDER --text TEXT [--gpus 2] [--steps 20]

Each setup is a separate launch of `laconic compress` with one `lora` stage and the same number of sequences per step.
Prints target tokens per second of the training only, the peak memory of each GPU, and the losses. Returns 1 if a setup
fails, or if a loss differs by more than one per cent from that of one GPU.
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
    """Make the model, train it in each setup, and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parents[1] / "models" / "demo")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--steps", type=int, default=20, help="at least 5; the first are not timed")
    parser.add_argument("--layers", type=int, default=22)
    args = parser.parse_args()
    if args.steps < 5:
        parser.error("--steps: at least 5; the first are not timed")
    if args.gpus > 1 and 8 % args.gpus:
        parser.error(f"--gpus: a step's 8 sequences cannot be divided evenly among {args.gpus} GPUs")
    model = make_model(args.folder / "model", args.tokenizer, args.layers)
    setups = {"one GPU": (1, [])}
    if args.gpus > 1:
        ddp = ["--num_processes", str(args.gpus), "--multi_gpu"]
        fsdp = ["--num_processes", str(args.gpus), "--use_fsdp", "--fsdp_version", "2"]
        setups |= {f"DDP on {args.gpus}": (args.gpus, ddp), f"FSDP on {args.gpus}": (args.gpus, fsdp)}
    print("| setup | tokens/s | s per step | peak GB of each GPU | first loss | last loss |")
    print("|---|---:|---:|---:|---:|---:|")
    all_losses: list[list[float]] = []
    for setup, (count, launch) in setups.items():
        row, losses = train(model, args, setup, count, launch)
        print(row, flush=True)
        all_losses.append(losses)
    agree = all(
        math.isclose(a, b, rel_tol=0.01) for row in all_losses for a, b in zip(row, all_losses[0], strict=False)
    )
    print("\nlosses agree" if agree and all(all_losses) else "\nlosses do NOT agree, or a setup failed")
    return int(not (agree and all(all_losses)))


def make_model(folder: Path, tokenizer: Path, layers: int) -> Path:
    """Write a random Llama; with 22 layers it has 1.1 billion parameters."""
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
            model = LlamaForCausalLM(config)
        model.to("cpu", torch.bfloat16).save_pretrained(folder)
        for file in tokenizer.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def train(model: Path, args: argparse.Namespace, setup: str, count: int, launch: list[str]) -> tuple[str, list[float]]:
    """Run one setup; return its row, and its first and last loss, or no losses if it failed."""
    output = args.folder / setup.replace(" ", "-")
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
        log = args.folder / f"{output.name}.log"
        log.write_text(run.stdout + run.stderr)
        errors = [line for line in run.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        return f"| {setup} | failed, see {log}: {(errors or ['no error message'])[0][:300]} |", []
    result_json = json.loads(result.read_text())
    times = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("STEP ")]
    # The first steps are slower, because caches are cold.
    seconds = (times[-1] - times[2]) / (len(times) - 3)
    tokens = sum(step["tokens"] for step in result_json["curve"]) / len(result_json["curve"])
    first, last = (result_json["curve"][i]["loss"] for i in (0, -1))
    row = f"| {setup} | {tokens / seconds:.0f} | {seconds:.3f} | {', '.join(peaks)} | {first:.4f} | {last:.4f} |"
    return row, [first, last]


def worker(recipe: str, output: str) -> None:
    """Run one process of a launch."""
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
