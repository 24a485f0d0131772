"""Speed of attention over a packed cache on a GPU.

    python benchmarks/kv_attention.py [--bits 2 3 4 8] [--untuned]

One decode step of a layer of Llama-3-8B's shape (32 query heads, 8 key-value heads, 128 channels): keys per channel in
groups of tokens, values per token in groups of channels, the last 128 tokens in 16 bit. The baseline is the fastest
scaled_dot_product_attention of torch on a 16-bit cache: every backend, with grouped queries, and with the queries of a
group as tokens of one head.

First the kernel is compared with the float32 reference on a small case; nothing is timed if it is wrong. Then tile
sizes are tried (in parallel processes, because compilation takes longest), and each size is timed: a CUDA graph of
calls over copies of the cache that together are far larger than the L2 cache, so that no call reads from it; the median
of replays. Bytes are all stored bytes, compared with the bandwidth of a device-to-device copy of 2 GiB, which reads and
writes. Takes 3 to 4 minutes; sizes that do not fit into memory or time are skipped, and listed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laconic.kv.attention import kv_attention_torch
from laconic.kv.format import KvFormat, encode_kv
from laconic.kv.packed import PackedHistory, PackedTokens

HEADS, KV_HEADS, CHANNELS, WINDOW = 32, 8, 128, 128
Cut = tuple[int, int, int, int]
"""Fields of a `LaunchConfig`: tokens, warps, stages, programs."""
CUTS: list[Cut] = [(n, w, s, 12) for n, w, s in itertools.product((32, 64), (1, 2), (1, 2, 3))]
PROGRAMS = (4, 8, 16, 24, 32)
Case = tuple[Tensor, PackedHistory]


def main() -> int:
    """Check, tune and time the kernel; return 2 without a GPU, 1 if the kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="in thousands of 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--key-group", type=int, default=64, help="tokens that share a key channel's range")
    parser.add_argument("--value-group", type=int, default=64, help="channels that share a value's range")
    parser.add_argument("--untuned", action="store_true", help="use the kernel's default tile sizes")
    parser.add_argument("--seconds", type=float, default=225, help="time after which no new size is started")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 2
    start = time.monotonic()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy has {copy / 1e9:.0f} GB/s\n", flush=True)

    formats = {b: (KvFormat(b, "channel", args.key_group), KvFormat(b, "token", args.value_group)) for b in args.bits}
    cuts: dict[int, Cut | None] = dict.fromkeys(args.bits)
    for tuning in (False,) if args.untuned else (False, True):
        if tuning:
            cuts = tune(formats)
        wrong = [bits for bits, pair in formats.items() if not correct(bits, *pair, cuts[bits])]
        if wrong:
            print(f"the kernel is wrong at {wrong} bits: nothing is timed")
            return 1
    print(f"\nchecked and tuned in {time.monotonic() - start:.0f} s\n", flush=True)

    print("| tokens | batch | best bf16 | bf16 ms | bits | ms | speed-up | GB/s | of copy |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    skipped = []
    for tokens, batch in itertools.product(args.tokens, args.batch):
        if time.monotonic() - start > args.seconds:
            skipped.append(f"{tokens}k x {batch} (time)")
            continue
        try:
            name, dense = best_bf16(batch, tokens * 1024)
            for bits, pair in formats.items():
                ms, moved = timed(batch, tokens * 1024, *pair, cuts[bits])
                rate = moved / ms * 1e3
                print(
                    f"| {tokens}k | {batch} | {name} | {dense:.3f} | {bits} | {ms:.3f} | {dense / ms:.2f} "
                    f"| {rate / 1e9:.0f} | {rate / copy:.0%} |",
                    flush=True,
                )
        except torch.cuda.OutOfMemoryError:
            skipped.append(f"{tokens}k x {batch} (memory)")
        torch.cuda.empty_cache()
    if skipped:
        print("\nskipped: " + ", ".join(skipped))
    print(f"\n{time.monotonic() - start:.0f} s in total")
    return 0


def attend(case: Case, cut: Cut | None) -> Tensor:
    """Run the kernel."""
    from laconic.kv.attention_triton import kv_attention_triton
    from laconic.kv.splits_triton import LaunchConfig

    return kv_attention_triton(*case, launch=None if cut is None else LaunchConfig(*cut))


def correct(bits: int, keys: KvFormat, values: KvFormat, cut: Cut | None = None) -> bool:
    """Compare the kernel with the reference on a small case of encoded numbers."""
    tokens = 16 * keys.tokens_at_once
    g = torch.Generator("cuda").manual_seed(0)
    k, v = torch.randn(2, 2, KV_HEADS, tokens, CHANNELS, generator=g, device="cuda")
    window = tuple(torch.randn(2, 2, KV_HEADS, 77, CHANNELS, generator=g, device="cuda").bfloat16())
    q = (2 * torch.randn(2, HEADS, 1, CHANNELS, generator=g, device="cuda")).bfloat16()
    packed = PackedTokens(keys, encode_kv(keys, k)), PackedTokens(values, encode_kv(values, v))
    case: Case = q, PackedHistory(*packed, (window[0], window[1]))
    expected = kv_attention_torch(q.float(), case[1])
    error = (attend(case, cut).float() - expected).abs()
    # The error of rounding the result and the probabilities to bfloat16, with a margin.
    most = 2**-6 * float(expected.abs().max())
    right = bool(error.max() <= most)
    print(
        f"{bits} bits: error {error.max():.1e} at most, {error.mean():.1e} on average "
        f"(largest number {expected.abs().max():.2f}): {'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def tune(formats: dict[int, tuple[KvFormat, KvFormat]]) -> dict[int, Cut | None]:
    """Find the fastest tile of each number of bits, over one long sequence and a batch of shorter ones."""
    jobs = [(pair, cut) for pair in formats.values() for cut in CUTS]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        # Triton caches compiled kernels on disk, where the trials below read them.
        list(pool.map(compile_only, jobs, chunksize=1))
    best_cuts: dict[int, Cut | None] = {}
    for bits, pair in formats.items():
        cases = [copies(batch, tokens, *pair) for batch, tokens in ((1, 65536), (16, 16384))]
        cost: dict[Cut, float] = {}

        def tried(cut: Cut, cases: Sequence[list[Case]] = cases, cost: dict[Cut, float] = cost) -> float:
            if cut not in cost:
                try:
                    cost[cut] = math.prod(graph_ms([lambda c=c: attend(c, cut) for c in case], 5) for case in cases)
                except Exception as e:  # a tile that needs more shared memory than the GPU has
                    print(f"{cut} does not run: {type(e).__name__}")
                    cost[cut] = math.inf
            return cost[cut]

        best = min(CUTS, key=tried)
        best = min([(*best[:3], programs) for programs in (best[3], *PROGRAMS)], key=tried)
        best_cuts[bits] = best
        ranked = ", ".join(f"{c} {math.sqrt(x):.3f}" for c, x in sorted(cost.items(), key=lambda e: e[1])[:4])
        print(f"{bits} bits: tokens, warps, stages, programs {best}; fastest: {ranked}", flush=True)
        del cases
        torch.cuda.empty_cache()
    return best_cuts


def compile_only(job: tuple[tuple[KvFormat, KvFormat], Cut]) -> None:
    """Compile the kernel by running a small case."""
    with suppress(Exception):
        attend(random_case(2, 4096, *job[0]), job[1])
        torch.cuda.synchronize()


def random_case(batch: int, tokens: int, keys: KvFormat, values: KvFormat) -> Case:
    """Make a cache of `tokens` tokens, window included, with random codes and the ranges of normal numbers."""
    count = tokens - WINDOW

    def stored(fmt: KvFormat) -> PackedTokens:
        codes = torch.randint(
            0, 256, (batch, KV_HEADS, count, CHANNELS * fmt.num_bits // 8), dtype=torch.uint8, device="cuda"
        )
        assert fmt.group_size is not None
        groups = (count // fmt.group_size, CHANNELS) if fmt.axis == "channel" else (count, CHANNELS // fmt.group_size)
        offset = -2 - torch.rand(batch, KV_HEADS, *groups, device="cuda", dtype=torch.float16)
        return PackedTokens(fmt, {"codes": codes, "scale": -2 * offset / (2**fmt.num_bits - 1), "offset": offset})

    q = torch.randn(batch, HEADS, 1, CHANNELS, device="cuda").bfloat16()
    window = torch.randn(2, batch, KV_HEADS, WINDOW, CHANNELS, device="cuda").bfloat16()
    return q, PackedHistory(stored(keys), stored(values), (window[0], window[1]))


def copies(batch: int, tokens: int, keys: KvFormat, values: KvFormat) -> list[Case]:
    """Make as many cases as together have four times the size of the L2 cache."""
    first = random_case(batch, tokens, keys, values)
    return [first, *(random_case(batch, tokens, keys, values) for _ in range(over_l2(stored_bytes(first)) - 1))]


def over_l2(size: int) -> int:
    return math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / size)


def stored_bytes(case: Case) -> int:
    history = case[1]
    packed = sum(t.nbytes for p in (history.keys, history.values) for t in p.stored.values())
    return packed + sum(w.nbytes for w in history.window)


def timed(batch: int, tokens: int, keys: KvFormat, values: KvFormat, cut: Cut | None) -> tuple[float, int]:
    """Return the milliseconds of a call, and the bytes that it reads."""
    cases = copies(batch, tokens, keys, values)
    return graph_ms([lambda c=c: attend(c, cut) for c in cases]), stored_bytes(cases[0])


def best_bf16(batch: int, tokens: int) -> tuple[str, float]:
    """Return the name and the milliseconds of the fastest attention over a 16-bit cache."""
    shape = batch, KV_HEADS, tokens, CHANNELS
    count = over_l2(2 * 2 * math.prod(shape))
    caches = [torch.empty(2, *shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(count)]
    q = torch.randn(batch, HEADS, 1, CHANNELS, device="cuda").bfloat16()
    ms: dict[str, float] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for grouped in (True, False):

            def call(cache: Tensor, backend: SDPBackend = backend, grouped: bool = grouped) -> Tensor:
                query = q if grouped else q.view(batch, KV_HEADS, HEADS // KV_HEADS, CHANNELS)
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=grouped)

            # Not every backend supports every shape.
            with suppress(RuntimeError):
                name = backend.name.split("_")[0].lower() + ("" if grouped else ", group as tokens")
                ms[name] = graph_ms([lambda c=c, call=call: call(c) for c in caches])
    best = min(ms, key=lambda name: ms[name])
    return best, ms[best]


def graph_ms(calls: Sequence[Callable[[], Tensor]], replays: int = 15) -> float:
    """Return the milliseconds of a call: the median of replays of a CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_ms(graph.replay, replays) / len(calls)


def event_ms(call: Callable[[], object], times: int) -> float:
    """Return the median milliseconds, after two warm-up calls."""
    spans = []
    for _ in range(times + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in spans[2:])[times // 2]


def copy_bandwidth() -> float:
    """Return the bytes per second of a device-to-device copy, reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source), 15) * 1e3


if __name__ == "__main__":
    sys.exit(main())
