"""Speed of attention over packed pages on a GPU, as in vLLM's plugin.

    python benchmarks/kv_paged.py [--bits 2 3 4 8] [--tune]

One decode step of a layer of Llama-3-8B's shape (32 query heads, 8 key-value heads, 128 channels) over pages in random
order: `kv_per_token` in pages of 16 tokens, and keys per channel in groups of 64 tokens with values per token and head
in pages of 512. The baselines are the fastest scaled_dot_product_attention of torch on a contiguous 16-bit cache, and
plain torch on the same pages.

First the kernel is compared with plain torch on the same pages; nothing is timed if it is wrong. Then each size is
timed as in `kv_attention.py`: a CUDA graph of calls over caches that together are far larger than the L2 cache.
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
from laconic.kv.splits_triton import LaunchConfig
from laconic.serving import paged_attention as paged
from laconic.serving import paged_triton
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import UnitTokens, write_tokens, write_units

# Number of tokens that are encoded; further pages are copies of these.
_WRITTEN = 4096
LAUNCHES = [LaunchConfig(n, w, 3, p) for n, w, p in itertools.product((32, 64), (1, 2, 4), (8, 16, 32))]
Case = tuple[PagedLayer, Tensor, SequenceBatch, tuple[Tensor, Tensor, Tensor], UnitTokens | None]


def main() -> int:
    """Check, tune and time the kernel; return 2 without a GPU, 1 if the kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 64, 128], help="in thousands of 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tune", action="store_true", help="find the fastest tile sizes first")
    parser.add_argument("--seconds", type=float, default=225, help="time after which no new size is started")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 2
    start = time.monotonic()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy has {copy / 1e9:.0f} GB/s\n", flush=True)
    wrong = [name for bits in args.bits for name, layer in layers(bits).items() if not correct(name, layer)]
    if wrong:
        print(f"the kernel is wrong for {wrong}: nothing is timed")
        return 1
    launches: dict[tuple[str, int], LaunchConfig | None] = {
        (name, bits): None for bits in args.bits for name in layers(bits)
    }
    if args.tune:
        launches = {(name, bits): tuned(name, layer) for bits in args.bits for name, layer in layers(bits).items()}
    print(f"\nready after {time.monotonic() - start:.0f} s\n", flush=True)
    print("| tokens | batch | bf16 ms | pages | ms | speed-up over bf16 | over plain torch | GB/s | of copy |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|", flush=True)
    skipped = []
    for tokens, batch in itertools.product(args.tokens, args.batch):
        if time.monotonic() - start > args.seconds:
            skipped.append(f"{tokens}k x {batch} (time)")
            continue
        try:
            _, dense = best_bf16(batch, tokens * 1024)
            for bits in args.bits:
                for name, layer in layers(bits).items():
                    ms, plain, moved = timed(batch, tokens * 1024, layer, launches[name, bits])
                    rate = moved / ms * 1e3
                    times = f"{dense:.3f} | {name} | {ms:.3f} | {dense / ms:.2f} | {plain / ms:.1f}"
                    print(
                        f"| {tokens}k | {batch} | {times} | {rate / 1e9:.0f} | {rate / copy:.0%} |",
                        flush=True,
                    )
        except torch.cuda.OutOfMemoryError:
            skipped.append(f"{tokens}k x {batch} (memory)")
        torch.cuda.empty_cache()
    if skipped:
        print("\nskipped: " + ", ".join(skipped))
    print(f"\n{time.monotonic() - start:.0f} s in total")
    return 0


def layers(bits: int) -> dict[str, PagedLayer]:
    """Return the layers to time at this number of bits, by name."""
    token = KvFormat(bits, "token", CHANNELS)
    layers_by_name = {
        f"{bits} bits by token": PagedLayer([HeadGroup(token, token)], {}, KV_HEADS, CHANNELS, torch.bfloat16),
        f"{bits} bits, keys by channel": PagedLayer(
            [HeadGroup(KvFormat(bits, "channel", 64), token)], {}, KV_HEADS, CHANNELS, torch.bfloat16, page_tokens=512
        ),
    }
    return {name: layer.to(torch.device("cuda")) for name, layer in layers_by_name.items()}


def case(batch: int, tokens: int, layer: PagedLayer) -> Case:
    """Make a decode step of `batch` sequences of `tokens` tokens, the new one included."""
    page = layer.page_tokens or 16
    some = min(tokens, _WRITTEN)
    pages = -(-some // page)
    written = torch.zeros(pages, KV_HEADS, page, layer.row_bytes, dtype=torch.uint8, device="cuda")
    part = SequenceBatch(
        torch.arange(pages, device="cuda")[None], torch.tensor([some], device="cuda"), some, torch.arange(some)[None]
    )
    k, v = (torch.randn(1, some, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    (write_units if layer.unit > 1 else write_tokens)(layer, written, part, k, v)
    count = -(-tokens // page)
    cache = written.repeat(-(-batch * count // pages), 1, 1, 1)[: batch * count]
    table = torch.randperm(batch * count, device="cuda").int().view(batch, count)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    step = SequenceBatch(table, lengths, tokens, torch.arange(batch, device="cuda")[:, None])
    q = torch.randn(batch, 1, HEADS, CHANNELS, device="cuda").bfloat16()
    k, v = (torch.randn(batch, 1, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    units = write_units(layer, cache, step, k, v) if layer.unit > 1 else None
    return layer, cache, step, (q, k, v), units


def run_attention(step_case: Case, launch: LaunchConfig | None = None, *, plain: bool = False) -> Tensor:
    """Attend by the kernel, with the given or its default tile sizes, or in plain torch."""
    layer, cache, part, tokens, units = step_case
    theirs, best = paged.kernel_reads_pages, paged_triton.default_launch
    if plain:
        paged.kernel_reads_pages = lambda *_: False
    if launch:
        paged_triton.default_launch = lambda *_: launch
    try:
        return paged.paged_attention(layer, cache, part, tokens, Scoring(CHANNELS**-0.5), units)
    finally:
        paged.kernel_reads_pages, paged_triton.default_launch = theirs, best


def correct(name: str, layer: PagedLayer) -> bool:
    """Compare the kernel with plain torch on the same pages."""
    torch.manual_seed(0)
    small = case(3, 5000, layer)
    assert paged.kernel_reads_pages(layer, Scoring(1.0), small[1])
    output, expected = run_attention(small), run_attention(small, plain=True)
    error = (output - expected).abs()
    right = bool(error.max() <= 2**-6 * expected.abs().max())
    print(
        f"{name}: error {error.max():.1e} at most (largest number {expected.abs().max():.2f}): "
        f"{'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def tuned(name: str, layer: PagedLayer) -> LaunchConfig:
    """Find the fastest tile sizes over one long sequence and a batch of shorter ones."""
    cases = [case(1, 65536, layer), case(16, 16384, layer)]
    cost = {}
    for launch in LAUNCHES:
        ms = [graph_ms([lambda c=c, launch=launch: run_attention(c, launch)], 5) for c in cases]  # type: ignore[misc]
        cost[launch] = ms[0] * ms[1]
    ranked = sorted(cost, key=lambda launch: cost[launch])
    print(
        f"{name}: " + ", ".join(f"{c.block_tokens}/{c.warps}/{c.programs} {cost[c] ** 0.5:.3f}" for c in ranked[:4]),
        flush=True,
    )
    return ranked[0]


def timed(batch: int, tokens: int, layer: PagedLayer, launch: LaunchConfig | None) -> tuple[float, float, int]:
    """Return the milliseconds of a call by the kernel and in plain torch, and the bytes that are read."""
    first = case(batch, tokens, layer)
    size = batch * tokens * KV_HEADS * layer.row_bytes
    cases = [first, *(case(batch, tokens, layer) for _ in range(over_l2(size) - 1))]
    calls: list[Callable[[], Tensor]] = [lambda c=c: run_attention(c, launch) for c in cases]  # type: ignore[misc]
    ms = graph_ms(calls)
    run_attention(first, plain=True)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run_attention(first, plain=True)
    end.record()
    torch.cuda.synchronize()
    return ms, start.elapsed_time(end), size


if __name__ == "__main__":
    sys.exit(main())
