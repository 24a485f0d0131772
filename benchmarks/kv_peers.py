"""Laconic's caches beside transformers' quantized ones of equal bits and groups: bytes, perplexity, needles, speed.

    pip install optimum-quanto hqq      # the backends of transformers' caches; missing ones are skipped
    python benchmarks/kv_peers.py MODEL --text TEXT [--bits 4 2] [--prompt needle] [--lengths 512,2048]

Prints Markdown. All caches are measured by the same code, in chunks of 32 tokens. Bytes are those of all tensors of a
cache right after a prompt, the components of quanto's and HQQ's tensors included. transformers' caches then hold
nothing in 16 bit; they decode and encode the whole history again after every `residual_length` new tokens. So
Laconic's caches are in the table twice: with a 16-bit window of that length, and without one, which has the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel, QuantizedCache

import laconic
from laconic.checkpoint.source import load_tokenizer
from laconic.data.text import bos_prefix, evaluation_windows, read_documents
from laconic.evaluation.cache_cost import memory_by_length, speed_by_length
from laconic.evaluation.caches import caches_for
from laconic.evaluation.context_perplexity import perplexity_by_position
from laconic.evaluation.needle import TEMPLATES, NeedleOptions, find_needles
from laconic.evaluation.through_cache import PLAIN


def peers(model: PreTrainedModel, bits: list[int], group: int, residual: int) -> dict[str, Callable[[], Cache]]:
    """Return constructors of transformers' caches that this environment can make.

    quanto takes the axis -1 or 0, HQQ 1 or 0, of a tensor (batch, heads, tokens, channels), with groups as each library
    forms them; both axes are transformers' defaults.
    """
    candidates: dict[str, Callable[[], Cache]] = {"transformers fp8": partial(QuantizedCache, "fp8", model.config)}
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for b in bits:
            keys = {"nbits": b, "axis_key": axis, "axis_value": axis, "q_group_size": group}
            candidates[f"transformers {backend} {b}"] = partial(
                QuantizedCache, backend, model.config, residual_length=residual, **keys
            )
    available = {}
    for name, new_cache in candidates.items():
        try:
            new_cache()
            available[name] = new_cache
        except (ImportError, ValueError) as e:  # ValueError: this version of transformers does not know the backend
            print(f"skipped: {name}: {e}")
    return available


def main() -> None:
    """Measure every cache on the same tokens and questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--residual-length", type=int, default=128)
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--prompt", default="needle", choices=TEMPLATES)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=10, help="prompts per forward pass")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    lengths = sorted(int(n) for n in args.lengths.split(","))
    model = laconic.load(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(Path(args.model))
    # Also without a 16-bit window, which has the same bits after a prompt as transformers' caches.
    caches = caches_for(
        model,
        [
            f"{{method: kivi, k_bits: {b}, v_bits: {b}, group_size: {args.group_size}, residual_length: {length}}}"
            for b in args.bits
            for length in dict.fromkeys((args.residual_length, 0))
        ],
    )
    caches |= peers(model, args.bits, args.group_size, args.residual_length)
    windows = evaluation_windows(read_documents(args.text), tokenizer, length=lengths[-1], limit=None)
    hay = windows[:, len(bos_prefix(tokenizer)) :].flatten().tolist()
    print(
        f"{args.model}, {args.text}, windows of {lengths[-1]} tokens, {args.dtype}, {torch.get_num_threads()} threads\n"
    )
    print("| cache | bits per number | MB | perplexity | KL mean | needles | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, new_cache in caches.items():
        # One cache at a time, so that each row is printed as soon as it is measured; all get the same prompts.
        single = {name: new_cache}
        pair = {PLAIN: caches[PLAIN], **single}
        whole = perplexity_by_position(model, windows[: args.windows], pair, chunk=args.chunk)[name][-1]
        cells = find_needles(
            model,
            tokenizer,
            hay,
            single,
            lengths,
            NeedleOptions(
                depths=args.depths,
                trials=args.trials,
                template=TEMPLATES[args.prompt],
                chunk=args.chunk,
                batch_size=args.batch_size,
            ),
        )[name]
        memory = memory_by_length(model, single, lengths[-1:])[name][-1]
        speed = speed_by_length(model, single, lengths[-1:])[name][-1]
        found = f"{sum(c.found for c in cells)}/{sum(c.trials for c in cells)}"
        print(
            f"| {name} | {memory.bits:.2f} | {memory.request_bytes / 1e6:.2f} | {whole.perplexity:.3f} "
            f"| {whole.kl_mean:.4f} | {found} | {speed.tokens_per_second:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
