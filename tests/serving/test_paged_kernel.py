"""The kernel over packed pages, by Triton's interpreter or a GPU, against the same attention in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup
from laconic.serving import paged_attention as paged
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import ExactTokens, write_tokens
from laconic.serving.paged_attention import paged_attention, why_not_by_kernel
from rotations import random_rotations

PER_PAGE, PAGES = 32, 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_channel(bits: int = 2, group_size: int | None = 16, **rest: Any) -> KvFormat:
    return KvFormat(bits, "channel", group_size, **rest)


FP8 = KvFormat(8, datatype="float", symmetric=True, group_size=64)
TABLE = by_channel(3, datatype="table", outlier_ratio=0.01)
# Channels of a head, groups of heads, options of the layer, sliding window.
CASES: dict[str, tuple[int, list[HeadGroup], dict[str, Any], int | None]] = {
    "by token": (128, [HeadGroup(KvFormat(4, group_size=128), KvFormat(3, group_size=128))], {}, None),
    "rotated, in a window": (64, [HeadGroup(KvFormat(8), KvFormat(2))], {"rotation": True}, 21),
    "by channel, sinks, recent": (
        64, [HeadGroup(by_channel(), KvFormat(2))], {"sinks": 3, "residual_length": 20}, None,
    ),
    "by channel both, in a window": (64, [HeadGroup(by_channel(4, 32), by_channel())], {"residual_length": 5}, 40),
    "table, outliers, before rotary": (
        128, [HeadGroup(TABLE, KvFormat(3, group_size=128, datatype="table", outlier_ratio=0.02))],
        {"sinks": 1, "rotary": True}, None,
    ),
    "FP8, static": (64, [HeadGroup(FP8, by_channel(4, None))], {}, None),
    "FP8 static, symmetric, recent": (
        64, [HeadGroup(by_channel(8, None, datatype="float", symmetric=True), KvFormat(4, symmetric=True))],
        {"residual_length": 7}, None,
    ),
    "heads apart": (
        64, [HeadGroup(by_channel(4, None), KvFormat(8), (1,)), HeadGroup(KvFormat(2), by_channel(2, 16), (0,))], {},
        None,
    ),
}  # fmt: skip


def paged_layer(name: str) -> PagedLayer:
    channels, groups, options, _ = CASES[name]
    random = torch.Generator().manual_seed(7)
    static, all_heads = {}, sum(len(group.heads or (0,)) for group in groups)
    for g, group in enumerate(groups):
        heads = len(group.heads or (0,))
        for side, fmt in (("keys", group.keys), ("values", group.values)):
            if fmt.calibrated:
                shape = (heads, channels) if fmt.datatype != "float" else (heads, 1)
                scale = (
                    (torch.rand(shape, generator=random) + 0.5)
                    * (3 if fmt.datatype == "float" else 40)
                    / 2**fmt.num_bits
                )
                static[f"{side}.{g}"] = {
                    "scale": scale,
                    "levels": torch.linspace(-1, 1, 2 ** min(fmt.num_bits, 4)).pow(3),
                }
                if not fmt.symmetric:
                    static[f"{side}.{g}"]["offset"] = -2 - torch.rand(shape, generator=random)
    options = dict(options)
    if options.pop("rotation", False):
        options["rotations"] = random_rotations(all_heads, channels)
    if options.pop("rotary", False):
        phases = torch.rand(128, channels // 2, generator=random).mul(6).repeat(1, 2)
        options["rotary"] = phases.cos() * 1.1, phases.sin() * 1.1
    layer = PagedLayer(
        groups, static, heads=all_heads, channels=channels, dtype=torch.float32, page_tokens=PER_PAGE, **options
    )
    return layer.to(DEVICE)


Step = tuple[Tensor, SequenceBatch, Tensor, ExactTokens, tuple[Tensor, Tensor]]


def step_of(layer: PagedLayer, new: int, seed: int) -> Step:
    """The pages of some texts, in which all that is not written is dirt, and their last tokens."""
    random = torch.Generator().manual_seed(seed)
    batch, each = 2, 3
    lengths = torch.tensor([new, int(torch.randint(66, 90, (), generator=random))])
    cache = torch.full((PAGES, layer.heads, PER_PAGE, layer.row_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    table = torch.randperm(PAGES, generator=random)[: batch * 3].view(batch, 3).to(DEVICE)
    k, v = (torch.randn(batch, 90, layer.heads, layer.channels, generator=random).to(DEVICE) for _ in range(2))
    for b, length in enumerate(lengths.tolist()):
        for begin, end in pairwise(sorted({0, (length - new) // 2, length - new})):
            of = torch.arange(end - begin, device=DEVICE)[None]
            part = SequenceBatch(table[b : b + 1], torch.tensor([end], device=DEVICE), end, of)
            write_tokens(layer, cache, part, k[b : b + 1, begin:end], v[b : b + 1, begin:end])
    part = SequenceBatch(table, lengths.to(DEVICE), 90, torch.arange(batch * new, device=DEVICE).view(batch, new))
    at = part.positions_BN[..., None, None].expand(-1, -1, layer.heads, layer.channels)
    q = torch.randn(batch, new, layer.heads * each, layer.channels, generator=random).to(DEVICE)
    k, v = k.gather(1, at), v.gather(1, at)
    return cache, part, q, write_tokens(layer, cache, part, k, v), (k, v)


def by_torch(layer: PagedLayer, step: Step, scoring: Scoring) -> Tensor:
    kernel_runs_on = paged.kernel_runs_on
    try:
        paged.kernel_runs_on = lambda _: False
        return paged_attention(layer, *step[:4], scoring)
    finally:
        paged.kernel_runs_on = kernel_runs_on


def check(name: str) -> None:
    layer, scoring = paged_layer(name), Scoring(0.2, window=CASES[name][3])
    assert why_not_by_kernel(layer, scoring, PER_PAGE) is None
    near = 1e-2 if DEVICE.type == "cuda" else 2e-3
    step = step_of(layer, 4, seed=4)
    found, expected = paged_attention(layer, *step[:4], scoring), by_torch(layer, step, scoring)
    torch.testing.assert_close(found, expected, atol=near, rtol=near)
    if layer.rotations is None:
        from laconic.serving.paged_triton import paged_decode

        cache, part, q, exact, (k, v) = step_of(layer, 1, seed=1)
        found = paged_decode(layer, cache, part, (q[:, 0], k[:, 0], v[:, 0]), scoring)
        expected = by_torch(layer, (cache, part, q, exact, (k, v)), scoring)
        torch.testing.assert_close(found, expected[:, 0], atol=near, rtol=near)


def check_prompt(name: str, new: int, decoded: list[int]) -> None:
    """For a long prompt pages are decoded: tokens before it, and of itself a page at a time."""
    # On a GPU only 16-bit numbers are decoded.
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    layer, scoring = replace(paged_layer(name), dtype=dtype), Scoring(0.2)
    cache, part, q, exact, _ = step_of(layer, new, seed=2)
    part = replace(part, known_lengths=part.lengths_B.tolist())
    expected = by_torch(layer, (cache, part, q, exact, (q, q)), scoring)
    found_decoded = []
    flash_attention, sizes = paged._flash_attention, (paged._MIN_PROMPT, paged._PROMPT_STEP)
    paged._MIN_PROMPT, paged._PROMPT_STEP = new, PER_PAGE
    paged._flash_attention = lambda q, k, v, scale: found_decoded.append(k.shape[2]) or flash_attention(q, k, v, scale)
    try:
        found = paged_attention(layer, cache, part, q, exact, scoring)
    finally:
        (paged._MIN_PROMPT, paged._PROMPT_STEP), paged._flash_attention = sizes, flash_attention
    assert found_decoded == decoded
    near = 1e-2 if DEVICE.type == "cuda" else 2e-3
    torch.testing.assert_close(found, expected, atol=near, rtol=near)


@pytest.mark.parametrize(("new", "decoded"), [(12, [32]), (60, [32, 32])])
def test_long_prompts_decode_whole_pages(on_triton: Callable[..., Any], new: int, decoded: list[int]) -> None:
    on_triton(check_prompt, "by channel, sinks, recent", new, decoded)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_reference(name: str, on_triton: Callable[..., Any]) -> None:
    on_triton(check, name)


@pytest.mark.parametrize("fmt", [KvFormat(4, outlier_ratio=0.1), KvFormat(16), KvFormat(5)])
def test_what_the_kernel_does_not_read_is_left_to_torch(fmt: KvFormat) -> None:
    layer = PagedLayer([HeadGroup(fmt, fmt)], {}, heads=1, channels=64, dtype=torch.float32)
    assert "does not read" in (why_not_by_kernel(layer, Scoring(1.0), PER_PAGE) or "")


def check_write(name: str) -> None:
    """Each program writes what `write_tokens` does: the token, and the unit that it completes."""
    from laconic.serving.paged_triton import paged_write, why_not_written

    layer = paged_layer(name)
    assert why_not_written(layer) is None
    random = torch.Generator().manual_seed(3)
    table = torch.randperm(PAGES, generator=random)[:6].view(3, 2).int().to(DEVICE)
    # Of the second sequence a unit is completed; the third is padding.
    lengths = torch.tensor([PER_PAGE - 5, PER_PAGE + layer.unit, 0], dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(PAGES, layer.heads, PER_PAGE, layer.row_bytes, dtype=torch.uint8, device=DEVICE)
    k, v = (torch.randn(2, 90, layer.heads, layer.channels, generator=random).to(DEVICE) for _ in range(2))
    for b, length in enumerate(lengths[:2].tolist()):
        of = torch.arange(length - 1, device=DEVICE)[None]
        part = SequenceBatch(table[b : b + 1].long(), torch.tensor([length - 1], device=DEVICE), length - 1, of)
        write_tokens(layer, cache, part, k[b : b + 1, : length - 1], v[b : b + 1, : length - 1])
    found = cache.clone()
    last = lengths[:2].long() - 1
    new = [x[torch.arange(2, device=DEVICE), last][:, None] for x in (k, v)]
    part = SequenceBatch(table[:2].long(), lengths[:2], 90, torch.arange(2, device=DEVICE)[:, None])
    write_tokens(layer, cache, part, *new)
    padded = [torch.cat([x[:, 0], x[:1, 0]]) for x in new]
    paged_write(layer, found, SequenceBatch(table, lengths, 90, torch.arange(3, device=DEVICE)[:, None]), *padded)
    different = found != cache
    # Keys from before their rotary embedding differ by the last digit of a sum, which a GPU rounds once: an outlier by
    # one unit of its last place, and a number on the edge between two codes by a code. The unit has some 2,000 bytes.
    most = 32 if DEVICE.type == "cuda" else 3
    assert cache.any()
    assert different.sum() <= (most if layer.rotary is not None else 0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "rotation" not in case[2]])
def test_written_by_the_kernel_are_the_same_bytes(name: str, on_triton: Callable[..., Any]) -> None:
    on_triton(check_write, name)
