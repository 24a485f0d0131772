"""Decoding speed of a Llama on a GPU with a quantized cache: read packed by the kernel, and decoded first.

    python benchmarks/kv_generate.py [--lengths 8192,32768] [--batch 1,8] [--layers 8] [--kv YAML ...]

A random Llama of the width of Llama-3-8B (hidden 4096, 32 query heads, 8 key-value heads, 128 channels) with few of its
layers, in bfloat16. Caches are filled with noise, because speed does not depend on values. Prints Markdown: *kernel*
reads packed tokens, *decoded* is the same cache decoded for `sdpa`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from laconic.evaluation.cache_cost import filled, stored_bytes
from laconic.evaluation.caches import caches_for, parse_stage, title
from laconic.evaluation.through_cache import PLAIN, step
from laconic.kv.cache import KvCache
from laconic.kv.shape import kv_shape

KIVI = ("{method: kivi, k_bits: 4, v_bits: 4}", "{method: kivi, k_bits: 2, v_bits: 2}")


def main() -> int:
    """Measure every cache at every length; return 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", action="append", metavar="YAML", help="a cache; KIVI at 4 and 2 bits by default")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 2
    model = random_llama(args.layers)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.layers} layers\n")
    print("| tokens | batch | cache | MB | ms per token | tokens/s | speed-up over 16 bit |")
    print("|---:|---:|---|---:|---:|---:|---:|", flush=True)
    for length in map(int, args.lengths.split(",")):
        for batch in map(int, args.batch.split(",")):
            plain = None
            for name, new_cache in variants(model, args.kv or KIVI):
                try:
                    ms, nbytes = timed(model, new_cache, batch, length, args.steps)
                except torch.cuda.OutOfMemoryError:
                    print(f"| {length} | {batch} | {name} | | | out of memory | |", flush=True)
                    continue
                finally:
                    torch.cuda.empty_cache()
                plain = ms if name == PLAIN else plain
                share = "" if plain is None else f"{plain / ms:.2f}"
                print(
                    f"| {length} | {batch} | {name} | {nbytes / 1e6:.0f} | {ms:.2f} | {1000 * batch / ms:.0f} "
                    f"| {share} |",
                    flush=True,
                )
    return 0


def random_llama(layers: int) -> PreTrainedModel:
    """Make a Llama with random weights on the GPU."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=1 << 18,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: PreTrainedModel = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return model


def variants(model: PreTrainedModel, kv: tuple[str, ...] | list[str]) -> Iterator[tuple[str, Callable[[], Cache]]]:
    """Yield names and constructors of caches: 16 bit, and each of `kv`, read by the kernel and decoded."""
    named = {text: title(parse_stage(text)) for text in kv}
    caches = caches_for(model, kv)
    yield PLAIN, caches[PLAIN]
    for name in named.values():
        yield f"{name}, kernel", caches[name]
        yield f"{name}, decoded", partial(decoded, caches[name])


def decoded(new_cache: Callable[[], Cache]) -> Cache:
    """Make a cache that is decoded for every token."""
    cache = new_cache()
    assert isinstance(cache, KvCache)
    for layer in cache.quantized_layers:
        layer.lazy = False
    return cache


@torch.no_grad()
def timed(
    model: PreTrainedModel, new_cache: Callable[[], Cache], batch: int, length: int, steps: int
) -> tuple[float, int]:
    """Return the mean milliseconds of a step, and the bytes of the cache.

    Everything is done twice and timed the second time, because cuDNN makes a plan, which takes ten milliseconds, for
    every new length.
    """
    ids = torch.zeros(batch, 1, dtype=torch.long)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        cache = filled(new_cache(), kv_shape(model.config), batch, length, model.dtype, model.device)
        nbytes = stored_bytes(cache)
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step(model, ids, cache, last=True)
        end.record()
        torch.cuda.synchronize()
        del cache
    return start.elapsed_time(end) / steps, nbytes


if __name__ == "__main__":
    sys.exit(main())
