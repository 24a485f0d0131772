"""The kernel over packed pages, by Triton's interpreter or a GPU, against the same attention in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup
from laconic.serving import paged_attention as paged
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import write_tokens, write_units
from laconic.serving.paged_attention import kernel_reads_pages, paged_attention
from rotations import random_rotations

HEADS, CHANNELS, PER_PAGE = 2, 128, 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BY_CHANNEL = KvFormat(2, axis="channel", group_size=8)
CASES: list[tuple[KvFormat, KvFormat, dict[str, Any], int | None]] = [
    (KvFormat(4), KvFormat(3), {}, None),
    (KvFormat(8, group_size=16), KvFormat(2, group_size=16), {"rotations": random_rotations(HEADS, CHANNELS)}, 9),
    (KvFormat(3, symmetric=True), KvFormat(4), {"sinks": 3, "page_tokens": PER_PAGE}, None),
    (
        BY_CHANNEL,
        KvFormat(2),
        {"sinks": 5, "page_tokens": PER_PAGE, "rotations": random_rotations(HEADS, CHANNELS)},
        None,
    ),
    (KvFormat(3, axis="channel", group_size=16), BY_CHANNEL, {"page_tokens": PER_PAGE}, 20),
]


def check(case: int, seed: int) -> None:
    keys, values, rest, window = CASES[case]
    random = torch.Generator().manual_seed(seed)
    groups = [HeadGroup(keys, values)]
    layer = PagedLayer(groups, {}, heads=HEADS, channels=CHANNELS, dtype=torch.float32, **rest).to(DEVICE)
    batch, new, each = (int(torch.randint(1, most, (), generator=random)) for most in (4, 8, 5))
    lengths = torch.randint(new, 70, (batch,), generator=random)
    cache = torch.full((24, HEADS, PER_PAGE, layer.row_bytes + 4), 0xFF, dtype=torch.uint8, device=DEVICE)
    table = torch.randperm(24, generator=random)[: batch * 6].view(batch, 6).to(DEVICE)
    store = write_units if layer.unit > 1 else write_tokens
    k, v = (torch.randn(batch, 70, HEADS, CHANNELS, generator=random).to(DEVICE) for _ in range(2))
    for b, length in enumerate(lengths.tolist()):
        for begin, end in pairwise(sorted({0, (length - new) // 2, length - new})):
            part = SequenceBatch(
                table[b : b + 1], torch.tensor([end], device=DEVICE), end, torch.arange(end - begin)[None]
            )
            store(layer, cache, part, k[b : b + 1, begin:end], v[b : b + 1, begin:end])
    part = SequenceBatch(table, lengths.to(DEVICE), int(lengths.max()), torch.arange(batch * new).view(batch, new))
    at = part.positions_BN.to(DEVICE)[..., None, None].expand(-1, -1, HEADS, CHANNELS)
    q = torch.randn(batch, new, HEADS * each, CHANNELS, generator=random).to(DEVICE)
    last = q, k.gather(1, at), v.gather(1, at)
    units = store(layer, cache, part, *last[1:])
    scoring = Scoring(0.2, window=window)
    assert kernel_reads_pages(layer, scoring, cache)
    found = paged_attention(layer, cache, part, last, scoring, units)
    theirs = paged.kernel_reads_pages
    try:
        paged.kernel_reads_pages = lambda *_: False
        plain = paged_attention(layer, cache, part, last, scoring, units)
    finally:
        paged.kernel_reads_pages = theirs
    near = 1e-2 if DEVICE.type == "cuda" else 1e-4  # TF32 on a GPU
    torch.testing.assert_close(found, plain, atol=near, rtol=near)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernel_is_the_reference(case: int, on_triton: Callable[..., Any]) -> None:
    for seed in range(2):
        on_triton(check, case, seed)


@pytest.mark.parametrize("fmt", [KvFormat(4, outlier_ratio=0.1), KvFormat(16), KvFormat(5)])
def test_what_the_kernel_does_not_read_is_left_to_torch(fmt: KvFormat) -> None:
    layer = PagedLayer([HeadGroup(fmt, fmt)], {}, heads=HEADS, channels=CHANNELS, dtype=torch.float32)
    cache = torch.zeros(4, HEADS, PER_PAGE, layer.row_bytes // 2 * 2, dtype=torch.uint8, device=DEVICE)
    assert not kernel_reads_pages(layer, Scoring(1.0), cache)
