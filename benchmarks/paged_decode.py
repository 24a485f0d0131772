"""Speed of a decode step's attention over packed pages on a GPU, as in vLLM's plugin.

    python benchmarks/paged_decode.py --json paged_decode.json [--launch default 64/1/1/16/168 64/1/1/16/128]

One layer of Llama-3-8B's shape (32 query heads, 8 key-value heads, 128 channels), pages in random order: `kivi` (keys
per channel in groups of 64 tokens, values per token in groups of 64 channels, pages of 512 tokens) at several numbers
of bits, `kv_per_token` at 4 bits, and `kvquant` (keys before their rotary embedding, levels from a table, one outlier
of a token and head in 16 bit). The baseline is the fastest scaled_dot_product_attention of torch on a contiguous bf16
cache, FlashAttention's and cuDNN's among them, in the same run.

First both kernels are compared with plain torch on the same pages; a format that is wrong is not timed. Times are of a
CUDA graph of calls over caches that together are far larger than the L2 cache: the median of replays. Bytes are those
that are stored for the tokens; *of copy* is their rate over that of a device-to-device copy, reads and writes. With
several `--launch` (tokens of a block / warps / stages / programs of a multiprocessor / registers of a thread, which may
be left out) each format is timed with each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from kv_attention import CHANNELS, HEADS, KV_HEADS, best_bf16, copy_bandwidth, graph_ms, over_l2
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup
from laconic.kv.splits_triton import LaunchConfig
from laconic.serving import paged_attention as paged
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import write_tokens

# Number of tokens that are encoded; further pages are copies of these.
_WRITTEN = 2048
_SCORING = Scoring(CHANNELS**-0.5)
Case = tuple[PagedLayer, Tensor, SequenceBatch, tuple[Tensor, Tensor, Tensor]]


def main() -> int:
    """Check and time the kernel; return 2 without a GPU, 1 if the kernel is wrong for some format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64], help="in thousands of 1024")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--formats", nargs="+", default=list(_formats()), choices=list(_formats()))
    parser.add_argument("--launch", nargs="+", default=["default"], help="tokens/warps/stages/programs[/registers]")
    parser.add_argument("--write", action="store_true", help="time writing the new tokens too")
    parser.add_argument("--page", type=int, default=512, help="tokens of a page")
    parser.add_argument("--seconds", type=float, default=85, help="time after which no new size is started")
    parser.add_argument("--json", type=Path, help="file to write the results into")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to time")
        return 2
    begin = time.monotonic()
    jobs = list(itertools.product(args.formats, args.launch))
    # Triton caches compiled kernels on disk, where this process reads them.
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        right = dict(zip(jobs, pool.map(correct, *zip(*jobs, strict=True), itertools.repeat(args.page)), strict=True))
    copy = copy_bandwidth()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_s": round(copy / 1e9),
        "page": args.page, "write": args.write,
        "wrong": [f"{name} {launch}" for (name, launch), is_right in right.items() if not is_right],
        "rows": [], "skipped": [],
    }  # fmt: skip
    print(f"{results['device']}, torch {torch.__version__}; a copy has {copy / 1e9:.0f} GB/s", flush=True)
    print(f"checked in {time.monotonic() - begin:.0f} s; wrong: {results['wrong'] or 'none'}\n", flush=True)
    print("| tokens | batch | bf16 ms | cache | launch | ms | of bf16's speed | GB/s | of copy |")
    print("|---:|---:|---:|---|---|---:|---:|---:|---:|", flush=True)
    for batch, tokens in itertools.product(args.batch, args.tokens):
        if time.monotonic() - begin > args.seconds:
            results["skipped"].append(f"{tokens}k x {batch}")
            continue
        try:
            backend, dense = best_bf16(batch, tokens * 1024)
        except torch.cuda.OutOfMemoryError:
            results["skipped"].append(f"{tokens}k x {batch} (memory)")
            continue
        for name, launch, ms, size in timed_formats(batch, tokens * 1024, [job for job in jobs if right[job]], args):
            row = {
                "tokens": tokens * 1024, "batch": batch, "bf16": backend, "bf16_ms": dense, "cache": name,
                "launch": launch, "ms": ms, "speedup": dense / ms, "GB_s": size / ms / 1e6,
                "of_copy": size / ms * 1e3 / copy,
            }  # fmt: skip
            results["rows"].append(row)
            print(
                f"| {tokens}k | {batch} | {dense:.3f} | {name} | {launch} | {ms:.3f} | {dense / ms:.2f} "
                f"| {row['GB_s']:.0f} | {row['of_copy']:.0%} |",
                flush=True,
            )
        torch.cuda.empty_cache()
    print(f"\nskipped: {', '.join(results['skipped']) or 'none'}; {time.monotonic() - begin:.0f} s in total")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if results["wrong"] else 0


def _formats() -> dict[str, tuple[KvFormat, KvFormat]]:
    """Return the formats of keys and values, by name."""
    kivi = {f"kivi {b} bits": (KvFormat(b, "channel", 64), KvFormat(b, "token", 64)) for b in (2, 3, 4, 8)}
    token, outliers = KvFormat(4, "token", CHANNELS), {"datatype": "table", "outlier_ratio": 0.01}
    return kivi | {
        "kv_per_token 4 bits": (token, token),
        "kvquant 3 bits": (KvFormat(3, "channel", 64, **outliers), KvFormat(3, "token", CHANNELS, **outliers)),
    }


def layer_of(name: str, page_tokens: int) -> PagedLayer:
    """Return a layer with a cache of this name."""
    keys, values = _formats()[name]
    options: dict[str, Any] = {}
    if keys.datatype == "table":
        levels = torch.linspace(-1, 1, 2**keys.num_bits)
        options["static"] = {
            f"{side}.0": {"levels": levels.sign() * levels.abs() ** 1.3} for side in ("keys", "values")
        }
        frequencies = 500000.0 ** -torch.arange(0, 1, 2 / CHANNELS)
        phases = (torch.arange(1 << 17)[:, None] * frequencies).repeat(1, 2)
        options |= {"rotary": (phases.cos(), phases.sin()), "sinks": 1}
    layer = PagedLayer(
        [HeadGroup(keys, values)], **{"static": {}} | options, heads=KV_HEADS, channels=CHANNELS, dtype=torch.bfloat16,
        page_tokens=page_tokens,
    )  # fmt: skip
    return layer.to(torch.device("cuda"))


def case(batch: int, tokens: int, layer: PagedLayer, *, write: bool = True) -> Case:
    """Make a decode step of `batch` sequences of `tokens` tokens, the new one included and perhaps written."""
    page = layer.page_tokens
    assert page is not None
    written = torch.zeros(_WRITTEN // page, KV_HEADS, page, layer.row_bytes, dtype=torch.uint8, device="cuda")
    of = torch.arange(_WRITTEN, device="cuda")[None]
    part = SequenceBatch(of[:, : len(written)], torch.tensor([_WRITTEN], device="cuda"), _WRITTEN, of)
    k, v = (torch.randn(1, _WRITTEN, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    write_tokens(layer, written, part, k, v)
    count = -(-tokens // page)
    cache = written.repeat(-(-batch * count // len(written)), 1, 1, 1)[: batch * count]
    table = torch.randperm(batch * count, device="cuda").int().view(batch, count)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    step = SequenceBatch(table, lengths, tokens, torch.arange(batch, device="cuda")[:, None])
    q = torch.randn(batch, HEADS, CHANNELS, device="cuda").bfloat16()
    k, v = (torch.randn(batch, KV_HEADS, CHANNELS, device="cuda").bfloat16() for _ in range(2))
    if write:
        write_tokens(layer, cache, step, k[:, None], v[:, None])
    return layer, cache, step, (q, k, v)


def attend(step: Case, launch: str, write: bool = False) -> Tensor:
    """Run the kernels."""
    from laconic.serving.paged_triton import paged_decode, paged_write

    config = None if launch == "default" else LaunchConfig(*map(int, launch.split("/")))
    if write:
        paged_write(*step[:3], *step[3][1:])
    return paged_decode(*step, _SCORING, launch=config)


def correct(name: str, launch: str, page_tokens: int) -> bool:
    """Compare the kernels with plain torch on the same pages; this compiles them too."""
    torch.manual_seed(0)
    layer = layer_of(name, page_tokens)
    with suppress(torch.cuda.OutOfMemoryError):
        step = case(2, 5120, layer, write=False)
        _, cache, batch, (q, k, v) = step
        by_kernel = cache.clone()
        found = attend((layer, by_kernel, batch, (q, k, v)), launch, write=True).float()
        exact = write_tokens(layer, cache, batch, k[:, None], v[:, None])
        if (by_kernel != cache).float().mean() > 1e-5:
            return False
        paged.kernel_runs_on = lambda _: False
        expected = paged.paged_attention(layer, cache, batch, q[:, None], exact, _SCORING)[:, 0]
        return bool((found - expected).abs().max() <= 2**-6 * expected.abs().max())
    return False


def timed_formats(
    batch: int, tokens: int, jobs: list[tuple[str, str]], args: argparse.Namespace
) -> Iterator[tuple[str, str, float, int]]:
    """Yield names, launches, the milliseconds of a call, and the bytes that are stored for its tokens."""
    for name, same_name in itertools.groupby(jobs, lambda job: job[0]):
        layer = layer_of(name, args.page)
        size = batch * tokens * KV_HEADS * (layer.slot_bytes + layer.shared_bytes // layer.unit)
        cases = [case(batch, tokens, layer) for _ in range(over_l2(size))]
        for _, launch in same_name:
            calls = [lambda c=c, launch=launch: attend(c, launch, args.write) for c in cases]  # type: ignore[misc]
            yield name, launch, graph_ms(calls, 9), size
        del cases


if __name__ == "__main__":
    sys.exit(main())
