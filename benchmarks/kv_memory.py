"""Bytes of a request and decoding speed by context length: quantized caches beside 16 bit.

    python benchmarks/kv_memory.py MODEL [--kv YAML ...] [--lengths 1024,4096,16384,32768] [--batch 1] [--device cpu]

Prints Markdown. Caches are filled with noise, because cost does not depend on values; so lengths beyond the model's
context can be measured too.
"""

from __future__ import annotations

import argparse
import os

import torch

import laconic
from laconic.evaluation.cache_cost import memory_by_length, speed_by_length
from laconic.evaluation.caches import caches_for

KIVI = ("{method: kivi, k_bits: 4, v_bits: 4}", "{method: kivi, k_bits: 2, v_bits: 2}")


def main() -> None:
    """Measure every cache at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv", action="append", metavar="YAML", help="a cache; KIVI at 4 and 2 bits by default")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    model = laconic.load(args.model, device=args.device, dtype=getattr(torch, args.dtype) if args.dtype else None)
    caches = caches_for(model, args.kv or KIVI)
    memory = memory_by_length(model, caches, lengths, batch=args.batch)
    speed = speed_by_length(model, caches, lengths, steps=args.steps, batch=args.batch)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {model.dtype}, {device}, batch {args.batch}, load {os.getloadavg()[0]:.1f}\n")
    print("| tokens | cache | bits per number | MB | of 16 bit | tokens/s |")
    print("|---:|---|---:|---:|---:|---:|")
    plain = next(iter(caches))
    for i, length in enumerate(lengths):
        for name in caches:
            m, s = memory[name][i], speed[name][i]
            share = m.batch_bytes / memory[plain][i].batch_bytes
            print(
                f"| {length} | {name} | {m.bits:.2f} | {m.batch_bytes / 1e6:.2f} | {share:.0%} "
                f"| {s.tokens_per_second:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
