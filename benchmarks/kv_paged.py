"""How fast attention over packed pages is on a GPU, as vLLM's plugin attends: python benchmarks/kv_paged.py.

One decode step of a layer of Llama-3-8B's shape (32 query heads, 8 key-value heads, 128 channels) over pages in random
order: `kv_per_token` in pages of 16 tokens, and keys a channel in groups of 64 tokens with values a token and head in
pages of 512. Against it, on a 16-bit cache that lies in one piece, the fastest that torch's
scaled_dot_product_attention has, and the same pages in plain torch.

First the kernel is held to plain torch over the same pages; nothing is timed if it is wrong. Then each size is timed as
`kv_attention.py` times: a CUDA graph of calls over caches that together are far larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable

import torch
from kv_attention import CHANNELS, HEADS, KV_HEADS, best_bf16, copy_bandwidth, graph_ms, over_l2
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup
from laconic.serving import paged, paged_triton
from laconic.serving.paged import PackedLayer, Part, Scoring, attend, write
from laconic.serving.paged_triton import Cut
from laconic.serving.paged_units import Units, write_units

# Tokens that are really written: pages of more are copies of theirs.
_WRITTEN = 4096
CUTS = [Cut(n, w, p) for n, w, p in itertools.product((32, 64), (1, 2, 4), (8, 16, 32))]
Case = tuple[PackedLayer, Tensor, Part, tuple[Tensor, Tensor, Tensor], Units | None]


def main() -> int:
    """Check, tune, time. Returns: 2 without a GPU, 1 when the kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 64, 128], help="in thousands of 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tune", action="store_true", help="try other ways to cut the work first")
    parser.add_argument("--seconds", type=float, default=225, help="after these no new size is begun")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing to time")
        return 2
    begun = time.monotonic()
    copy = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {copy / 1e9:.0f} GB/s\n", flush=True
    )
    wrong = [name for bits in args.bits for name, layer in layers(bits).items() if not correct(name, layer)]
    if wrong:
        print(f"the kernel is wrong for {wrong}: nothing is timed")
        return 1
    cuts: dict[tuple[str, int], Cut | None] = {(name, bits): None for bits in args.bits for name in layers(bits)}
    if args.tune:
        cuts = {(name, bits): tuned(name, layer) for bits in args.bits for name, layer in layers(bits).items()}
    print(f"\nready after {time.monotonic() - begun:.0f} s\n", flush=True)
    print("| tokens | batch | bf16 ms | pages | ms | speed-up over bf16 | over plain torch | GB/s | of copy |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|", flush=True)
    left_out = []
    for tokens, batch in itertools.product(args.tokens, args.batch):
        if time.monotonic() - begun > args.seconds:
            left_out.append(f"{tokens}k x {batch} (time)")
            continue
        try:
            _, dense = best_bf16(batch, tokens * 1024)
            for bits in args.bits:
                for name, layer in layers(bits).items():
                    ms, plain, moved = timed(batch, tokens * 1024, layer, cuts[name, bits])
                    rate = moved / ms * 1e3
                    times = f"{dense:.3f} | {name} | {ms:.3f} | {dense / ms:.2f} | {plain / ms:.1f}"
                    print(
                        f"| {tokens}k | {batch} | {times} | {rate / 1e9:.0f} | {rate / copy:.0%} |",
                        flush=True,
                    )
        except torch.cuda.OutOfMemoryError:
            left_out.append(f"{tokens}k x {batch} (memory)")
        torch.cuda.empty_cache()
    if left_out:
        print("\nleft out: " + ", ".join(left_out))
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    return 0


def layers(bits: int) -> dict[str, PackedLayer]:
    """What is timed at so many bits, by name."""
    token = KvFormat(bits, "token", CHANNELS)
    made = {
        f"{bits} bits by token": PackedLayer([HeadGroup(token, token)], {}, KV_HEADS, CHANNELS, torch.bfloat16),
        f"{bits} bits, keys by channel": PackedLayer(
            [HeadGroup(KvFormat(bits, "channel", 64), token)], {}, KV_HEADS, CHANNELS, torch.bfloat16, per_page=512
        ),
    }
    return {name: layer.to(torch.device("cuda")) for name, layer in made.items()}


def case(batch: int, tokens: int, layer: PackedLayer) -> Case:
    """A step of one new token of each sequence, of so many tokens with it."""
    page = layer.per_page or 16
    some = min(tokens, _WRITTEN)
    pages = -(-some // page)
    written = torch.zeros(pages, KV_HEADS, page, layer.nbytes, dtype=torch.uint8, device="cuda")
    part = Part(
        torch.arange(pages, device="cuda")[None], torch.tensor([some], device="cuda"), some, torch.arange(some)[None]
    )
    k, v = (torch.randn(1, some, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    (write_units if layer.unit > 1 else write)(layer, written, part, k, v)
    count = -(-tokens // page)
    cache = written.repeat(-(-batch * count // pages), 1, 1, 1)[: batch * count]
    table = torch.randperm(batch * count, device="cuda").int().view(batch, count)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    step = Part(table, lengths, tokens, torch.arange(batch, device="cuda")[:, None])
    q = torch.randn(batch, 1, HEADS, CHANNELS, device="cuda").bfloat16()
    k, v = (torch.randn(batch, 1, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    units = write_units(layer, cache, step, k, v) if layer.unit > 1 else None
    return layer, cache, step, (q, k, v), units


def attended(given: Case, cut: Cut | None = None, *, plain: bool = False) -> Tensor:
    """By the kernel, its work cut so, or as it cuts it itself; or in plain torch."""
    layer, cache, part, tokens, units = given
    theirs, best = paged.kernel_reads, paged_triton.best_cut
    if plain:
        paged.kernel_reads = lambda *_: False
    if cut:
        paged_triton.best_cut = lambda *_: cut
    try:
        return attend(layer, cache, part, tokens, Scoring(CHANNELS**-0.5), units)
    finally:
        paged.kernel_reads, paged_triton.best_cut = theirs, best


def correct(name: str, layer: PackedLayer) -> bool:
    """Whether the kernel gives what plain torch gives over the same pages."""
    torch.manual_seed(0)
    given = case(3, 5000, layer)
    assert paged.kernel_reads(layer, Scoring(1.0), given[1])
    found, expected = attended(given), attended(given, plain=True)
    error = (found - expected).abs()
    right = bool(error.max() <= 2**-6 * expected.abs().max())
    print(
        f"{name}: off by {error.max():.1e} at most (largest number {expected.abs().max():.2f}): "
        f"{'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def tuned(name: str, layer: PackedLayer) -> Cut:
    """The best cut over a long sequence alone and shorter ones together."""
    cases = [case(1, 65536, layer), case(16, 16384, layer)]
    cost = {}
    for cut in CUTS:
        ms = [graph_ms([lambda c=c, cut=cut: attended(c, cut)], 5) for c in cases]  # type: ignore[misc]
        cost[cut] = ms[0] * ms[1]
    ranked = sorted(cost, key=lambda cut: cost[cut])
    print(
        f"{name}: " + ", ".join(f"{c.tokens}/{c.warps}/{c.programs} {cost[c] ** 0.5:.3f}" for c in ranked[:4]),
        flush=True,
    )
    return ranked[0]


def timed(batch: int, tokens: int, layer: PackedLayer, cut: Cut | None) -> tuple[float, float, int]:
    """Milliseconds of a call by the kernel and in plain torch, and the bytes of slots and tails that are read."""
    first = case(batch, tokens, layer)
    size = batch * tokens * KV_HEADS * layer.nbytes
    cases = [first, *(case(batch, tokens, layer) for _ in range(over_l2(size) - 1))]
    calls: list[Callable[[], Tensor]] = [lambda c=c: attended(c, cut) for c in cases]  # type: ignore[misc]
    ms = graph_ms(calls)
    attended(first, plain=True)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    attended(first, plain=True)
    end.record()
    torch.cuda.synchronize()
    return ms, start.elapsed_time(end), size


if __name__ == "__main__":
    sys.exit(main())
