"""Our caches beside transformers' own quantized ones, of the same bits and groups: bytes, perplexity, needles, speed.

    pip install optimum-quanto hqq      # what transformers' backends need; those not there are left out
    python benchmarks/kv_peers.py MODEL --text TEXT [--bits 4 2] [--prompt needle] [--lengths 512,2048]

Prints Markdown. Everything goes through the same code, in chunks of 32 tokens; bytes are those of the tensors that a
cache really holds, the insides of quanto's and HQQ's among them, right after a prompt. transformers' caches then hold
nothing in 16 bit, and take the whole history through 16 bit and back whenever `residual_length` more have come; so
ours stand here twice, with that window and with none, which is as many bits as theirs.
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
    """transformers' caches that this environment can make. quanto takes the axis -1 or 0, HQQ 1 or 0, of a tensor
    (batch, heads, tokens, channels), cut into groups as each does it; both are left at transformers' default."""
    made: dict[str, Callable[[], Cache]] = {"transformers fp8": partial(QuantizedCache, "fp8", model.config)}
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for b in bits:
            keys = {"nbits": b, "axis_key": axis, "axis_value": axis, "q_group_size": group}
            made[f"transformers {backend} {b}"] = partial(
                QuantizedCache, backend, model.config, residual_length=residual, **keys
            )
    there = {}
    for name, new_cache in made.items():
        try:
            new_cache()
            there[name] = new_cache
        except (ImportError, ValueError) as e:  # ValueError: a backend that this transformers does not know yet
            print(f"left out: {name}: {e}")
    return there


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
    parser.add_argument("--batch-size", type=int, default=10, help="questions read at once")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    lengths = sorted(int(n) for n in args.lengths.split(","))
    model = laconic.load(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(Path(args.model))
    # Without a window of our own too, so that bytes right after a prompt are theirs.
    ours = caches_for(
        model,
        [
            f"{{method: kivi, k_bits: {b}, v_bits: {b}, group_size: {args.group_size}, residual_length: {kept}}}"
            for b in args.bits
            for kept in dict.fromkeys((args.residual_length, 0))
        ],
    )
    caches = ours | peers(model, args.bits, args.group_size, args.residual_length)
    windows = evaluation_windows(read_documents(args.text), tokenizer, length=lengths[-1], limit=None)
    hay = windows[:, len(bos_prefix(tokenizer)) :].flatten().tolist()
    print(
        f"{args.model}, {args.text}, windows of {lengths[-1]} tokens, {args.dtype}, {torch.get_num_threads()} threads\n"
    )
    print("| cache | bits a number | MB | perplexity | KL mean | needles | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, new_cache in caches.items():
        # One by one, so that a row is there as soon as it is measured; all are asked the same.
        alone = {name: new_cache}
        beside = {PLAIN: caches[PLAIN], **alone}
        whole = perplexity_by_position(model, windows[: args.windows], beside, chunk=args.chunk)[name][-1]
        cells = find_needles(
            model,
            tokenizer,
            hay,
            alone,
            lengths,
            NeedleOptions(
                depths=args.depths,
                trials=args.trials,
                template=TEMPLATES[args.prompt],
                chunk=args.chunk,
                batch_size=args.batch_size,
            ),
        )[name]
        memory = memory_by_length(model, alone, lengths[-1:])[name][-1]
        speed = speed_by_length(model, alone, lengths[-1:])[name][-1]
        found = f"{sum(c.found for c in cells)}/{sum(c.trials for c in cells)}"
        print(
            f"| {name} | {memory.bits:.2f} | {memory.request_bytes / 1e6:.2f} | {whole.perplexity:.3f} "
            f"| {whole.kl_mean:.4f} | {found} | {speed.tokens_per_second:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
