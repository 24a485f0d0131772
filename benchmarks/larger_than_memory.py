"""Compression of a checkpoint that is several times larger than the allowed memory.

    python benchmarks/larger_than_memory.py [--blocks 32 128] [--limit-gb 1.0] [--methods rtn gptq]

Writes random Llamas with these numbers of blocks, and compresses each in a process with a limit on its memory
(RLIMIT_DATA: everything except files mapped for reading). First it checks that the limit works: a process that reads
the whole largest checkpoint under it has to fail. MALLOC_MMAP_THRESHOLD_ makes glibc's allocator return freed tensors
at once, because freed memory that it keeps counts too. The table has the peak of the resident memory, mapped files
included, beside the size of the checkpoint. The defaults take 4.2 GB of disk, in a temporary folder that is removed at
the end, and a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "models" / "demo"
GB = 1_000_000_000


@dataclass(frozen=True)
class Run:
    method: str
    blocks: int
    checkpoint_bytes: int
    peak_bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128], help="number of blocks of each model")
    parser.add_argument(
        "--hidden", type=int, default=1024, help="hidden size; the feed-forward width is 2.75 times that"
    )
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    parser.add_argument("--limit-gb", type=float, default=1.0, help="memory limit of a compression, in 10^9 bytes")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    args = parser.parse_args()
    if args.hidden % 512:
        parser.error(f"--hidden {args.hidden} is not a multiple of 512, which groups of 128 need in every width")

    limit, runs = int(args.limit_gb * GB), []
    with tempfile.TemporaryDirectory(prefix="larger-than-memory-", dir=args.folder) as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(f.read_text() for f in sorted((ROOT / "docs").glob("*.md"))))
        for position, blocks in enumerate(sorted(args.blocks, reverse=True)):
            model = Path(scratch) / f"model-{blocks}"
            size = write_model(model, blocks, args.hidden, args.length)
            if position == 0:
                check_limit(model, limit, size)
            for method in args.methods:
                recipe = {
                    "stages": [{"method": method, "scheme": "W4A16"}],
                    "calibration": {
                        "dataset": str(text),
                        "num_calibration_samples": args.samples,
                        "max_seq_length": args.length,
                    },
                }
                runs.append(compress(model, recipe, blocks, size, limit))
            shutil.rmtree(model)
    print(table(runs, limit))


def write_model(folder: Path, blocks: int, hidden: int, length: int) -> int:
    """Write a random Llama, one block at a time with a shard each; return the bytes of its weights."""
    vocab = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner(hidden),
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for shard in range(blocks + 1):
        tensors = block(shard, hidden, g) if shard < blocks else outside(vocab, hidden, g)
        name = f"model-{shard + 1:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def inner(hidden: int) -> int:
    return hidden * 11 // 4


def block(i: int, hidden: int, g: torch.Generator) -> dict[str, Tensor]:
    shapes = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    shapes |= {f"mlp.{n}_proj": (inner(hidden), hidden) for n in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, inner(hidden))
    tensors = {n: random(*shape, g=g) for n, shape in shapes.items()}
    tensors |= {n: torch.ones(hidden, dtype=torch.bfloat16) for n in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{i}.{n}.weight": tensor for n, tensor in tensors.items()}


def outside(vocab: int, hidden: int, g: torch.Generator) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": random(vocab, hidden, g=g),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": random(vocab, hidden, g=g),
    }


def random(rows: int, columns: int, *, g: torch.Generator) -> Tensor:
    return (torch.randn(rows, columns, generator=g) / columns**0.5).bfloat16()


def check_limit(model: Path, limit: int, size: int) -> None:
    """Exit unless a process under the limit fails to read the whole checkpoint into memory."""
    if size < 2 * limit:
        raise SystemExit(
            f"the largest checkpoint has {size / GB:.1f} GB, not twice the limit of {limit / GB:.1f} GB; "
            "give more --blocks or a lower --limit-gb"
        )
    trial = child("hold", str(model), limit=limit)
    if trial.returncode == 0:
        raise SystemExit(
            "a process read the whole checkpoint under the limit: RLIMIT_DATA has no effect on this system"
        )
    if "alloc" not in trial.stderr.lower() and "MemoryError" not in trial.stderr:
        raise SystemExit(f"the trial of the limit failed for another reason:\n{trial.stderr[-2000:]}")


def compress(model: Path, recipe: dict, blocks: int, size: int, limit: int) -> Run:
    """Compress a model under the limit; exit if that fails."""
    process = child("compress", str(model), json.dumps(recipe), limit=limit)
    method = recipe["stages"][0]["method"]
    if process.returncode:
        raise SystemExit(f"{method}, {blocks} blocks, within {limit / GB:.2f} GB failed:\n{process.stderr[-2000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    print(f"{method}, {blocks} blocks: {result}", file=sys.stderr, flush=True)
    return Run(method, blocks, size, result["peak_memory_bytes"], result["seconds"])


def child(*arguments: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Run this file in a process whose memory is limited to `limit` bytes."""
    command = [sys.executable, __file__, "--child", str(limit), *arguments]
    # The limit also counts freed memory that the allocator keeps; above 1 MB it has to keep none.
    environment = {"MALLOC_MMAP_THRESHOLD_": "1000000"} | os.environ
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def as_child(limit: str, task: str, model: str, recipe: str = "{}") -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    if task == "hold":
        # A clone, because a mapped file does not count.
        tensors = [{n: t.clone() for n, t in load_file(f).items()} for f in sorted(Path(model).glob("*.safetensors"))]
        assert tensors
        return
    import laconic

    output = Path(model).with_name("artifact")
    artifact = laconic.compress(model, json.loads(recipe), output)
    result = artifact.results["compress"]
    shutil.rmtree(output)
    print(json.dumps({key: result[key] for key in ("peak_memory_bytes", "seconds")}))


def table(runs: list[Run], limit: int) -> str:
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
    lines = [
        f"Limit {limit / GB:.2f} GB; {threads} threads. Under it, reading the largest checkpoint whole fails.",
        "",
        "| method | blocks | checkpoint, GB | peak memory, GB | checkpoint over limit | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(runs, key=lambda r: (r.method, r.blocks)):
        lines.append(
            f"| {r.method} | {r.blocks} | {r.checkpoint_bytes / GB:.2f} | {r.peak_bytes / GB:.3f} "
            f"| {r.checkpoint_bytes / limit:.1f} | {r.seconds:.0f} |"
        )
    for method in dict.fromkeys(r.method for r in runs):
        rows = sorted((r for r in runs if r.method == method), key=lambda r: r.blocks)
        few, many = rows[0], rows[-1]
        if many.blocks > few.blocks:
            growth = (many.peak_bytes - few.peak_bytes) / (many.checkpoint_bytes - few.checkpoint_bytes)
            lines.append(f"\n{method}: {1000 * growth:.1f} MB more peak memory per GB of checkpoint.")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        as_child(*sys.argv[2:])
    else:
        # On SIGTERM the temporary folder is removed too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        main()
