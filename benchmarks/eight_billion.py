"""Time to compress a model of Llama-3-8B's shape on a GPU.

    python benchmarks/eight_billion.py FOLDER --text TEXT

Writes a random Llama of this shape into FOLDER (16 GB), and times GPTQ W4A16 with activation order over 128 x 2048
random tokens, from the checkpoint on disk to the artifact on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from laconic.pipeline.compression import prepare, run


def main() -> None:
    """Make the model, compress it, and print the times of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True, help="any text; random tokens replace it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--stages", default='[{"method": "gptq", "scheme": "W4A16"}]')
    args = parser.parse_args()
    source, output = args.folder / "model", args.folder / "artifact"
    start = time.monotonic()
    if not source.exists():
        make(source, args.layers)
    print(f"made the model in {time.monotonic() - start:.1f} s", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "stages": json.loads(args.stages),
        "calibration": {
            "dataset": args.text,
            "num_calibration_samples": args.samples,
            "max_seq_length": args.length,
        },
    }
    tokens = torch.randint(0, 32000, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    spent: Counter[str] = Counter()
    blocks: list[float] = []

    def report(event: Mapping[str, Any]) -> None:
        if event["event"] == "block":
            blocks.append(time.monotonic())
        elif event["event"] == "linear":
            spent["compressing linears"] += event["seconds"]

    start = time.monotonic()
    prepared = replace(prepare(str(source), recipe, output), windows=tokens)
    print(f"prepared in {time.monotonic() - start:.1f} s", flush=True)
    start = time.monotonic()
    run(prepared, report=report)
    seconds = time.monotonic() - start
    times = [b - a for a, b in pairwise(blocks)]
    print(f"compressed in {seconds:.1f} s; before the first block {blocks[0] - start:.1f} s", flush=True)
    print(f"per block: {sorted(times)[len(times) // 2]:.2f} s, its linears {spent.total() / len(blocks):.2f} s")
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def make(folder: Path, layers: int) -> None:
    """Write a random checkpoint with one shard per block."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for file in (Path(__file__).parents[1] / "models" / "demo").glob("token*"):
        shutil.copyfile(file, folder / file.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, kv, i, v = 4096, 1024, 14336, 128256
    block = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (i, h),
        "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
    }
    outside = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)}
    index: dict[str, str] = {}
    for number in range(layers + 1):
        prefix = f"model.layers.{number}"
        shapes = {f"{prefix}.{n}.weight": s for n, s in block.items()}
        shapes |= {f"{prefix}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes = outside if number == layers else shapes
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {}
        for n, shape in shapes.items():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device) * 0.02
            tensors[n] = tensor.to(torch.bfloat16).cpu()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


if __name__ == "__main__":
    main()
