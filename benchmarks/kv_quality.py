"""Table of caches: bits, perplexity and KL of each, read through the cache as in decoding.

    python benchmarks/kv_quality.py MODEL --calibration TEXT --text TEXT [--length 2048] [--windows 4] [--kv YAML ...]

Prints Markdown. A row is a stage of a recipe; stages that need calibration are calibrated by `laconic.compress` on the
calibration text, with unchanged weights. Bits include everything that a cache of the whole window stores: ranges,
outliers and the 16-bit window. KL is KL(16 bit || this cache) in nats per token, over the whole window and over its
second half.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import laconic
from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import evaluation_windows, read_documents
from laconic.evaluation.caches import parse_stage, title
from laconic.evaluation.context_perplexity import perplexity_by_position
from laconic.evaluation.through_cache import PLAIN, chunks, plain_cache, step
from laconic.kv.attach import make_cache
from laconic.kv.files import read_kv_scheme

ROWS = [
    "{method: kv_int8}",
    "{method: kv_fp8}",
    "{method: kv_per_token}",
    *(f"{{method: kv_per_token, k_bits: {b}, v_bits: {b}}}" for b in (4, 3, 2)),
    *(f"{{method: kivi, k_bits: {b}, v_bits: {b}}}" for b in (4, 3, 2)),
    *(f"{{method: kivi, k_bits: {b}, v_bits: {b}, residual_length: 0}}" for b in (4, 3, 2)),
    *(f"{{method: kivi, k_bits: {b}, v_bits: {b}, residual_length: 0, group_size: 64}}" for b in (3, 2)),
    *(f"{{method: kvquant, k_bits: {b}, v_bits: {b}}}" for b in (4, 3, 2)),
    "{method: kvquant, before_rope: false}",
    *(f"{{method: kvquant, correction: {c}, k_bits: {b}, v_bits: {b}}}" for c in ("q_norm", "none") for b in (3, 2)),
    "{method: kvquant, datatype: int}",
    "{method: kvquant, outlier_ratio: 0}",
    "{method: kvquant, k_bits: 2, v_bits: 2, outlier_ratio: 0}",
    "{method: kvquant, group_size: 32, outlier_ratio: 0}",
    "{method: kvquant, key_ranges: static}",
    *(f"{{method: kivi, k_bits: {k}, v_bits: {v}, residual_length: 0}}" for k, v in ((4, 2), (2, 4))),
    *(f"{{method: kvquant, k_bits: {k}, v_bits: {v}}}" for k, v in ((4, 2), (2, 4))),
    "{method: kivi, residual_length: 0, sinks: 4}",
    *(
        f"{{method: kivi, k_bits: {b}, v_bits: {b}, residual_length: 0, rotation: {r}}}"
        for b in (3, 2)
        for r in ("hadamard", "attention")
    ),
    "{method: kvquant, k_bits: 2, v_bits: 2, rotation: attention}",
    "{method: kv_per_token, k_bits: 2, v_bits: 2, rotation: attention}",
    "{method: kv_per_token, k_bits: 3, v_bits: 3, rotation: hadamard}",
    "{method: kvquant, budget_bits: 3}",
    "{method: kvquant, budget_bits: 3, per_head: true}",
    "{method: kivi, k_bits: 1, v_bits: 1, residual_length: 0}",
]


def main() -> None:
    """Make every cache and read the windows through all of them side by side."""
    args = options(__doc__).parse_args()
    model, caches = opened(args, args.kv or ROWS)
    documents = read_documents(args.text)
    windows = evaluation_windows(
        documents, load_tokenizer(model_folder(args.model)), length=args.length, limit=args.windows
    )
    half = args.length // 2
    buckets = perplexity_by_position(model, windows, caches, chunk=args.chunk, ends=[half, args.length])
    print("| cache | bits | perplexity | second half | KL | second half | same top-1 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (_, late, whole) in buckets.items():
        bits = 16.0 if name == PLAIN else filled(model, caches[name](), windows[:1]).effective_bits()
        print(
            f"| {name} | {bits:.2f} | {whole.perplexity:.3f} | {late.perplexity:.3f} | {whole.kl_mean:.4f} "
            f"| {late.kl_mean:.4f} | {100 * whole.top1_agreement:.1f} % |",
            flush=True,
        )


def options(
    description: str | None, *, length: int = 2048, windows: int = 4, samples: int = 16
) -> argparse.ArgumentParser:
    """Return a parser of the model, texts and caches, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--calibration-length", type=int, help="tokens per calibration sample; --length by default")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--kv", action="append", metavar="YAML", help="a row in place of the table's")
    return parser


def opened(args: argparse.Namespace, rows: Sequence[str]) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """Open the model in float32; return it and constructors of caches: transformers' own, and each row's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = laconic.load(args.model, device=device, dtype=torch.float32)
    caches: dict[str, Callable[[], Any]] = {PLAIN: partial(plain_cache, model)}
    for text in rows:
        stage = parse_stage(text)
        caches[title(stage)] = partial(make_cache, model, *calibrated(args, stage))
    return model, caches


def calibrated(args: argparse.Namespace, stage: dict[str, Any]) -> tuple[Any, Any]:
    """Return the scheme of a stage and its calibrated parameters."""
    calibration = {
        "dataset": args.calibration,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.calibration_length or args.length,
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "artifact"
        artifact = laconic.compress(args.model, {"stages": [stage], "calibration": calibration}, output)
        scheme = read_kv_scheme(artifact.path, artifact.config)
    assert scheme is not None
    return scheme


@torch.no_grad()
def filled(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    """Read tokens into a cache; convert its 16-bit tensors to bfloat16, because float32 computes."""
    for piece in chunks(ids, 128):
        step(model, piece, cache)
    for layer in cache.quantized_layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
        layer.sinks = layer.sinks and tuple(s.bfloat16() for s in layer.sinks)
        layer.stored = [
            tuple({n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in s.items()} for s in pair)
            for pair in layer.stored
        ]
    return cache


if __name__ == "__main__":
    main()
