"""Attention over packed pages, against attention as it is written down, over what was stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from laconic.formats.kv import KvFormat, decode_kv, encode_kv
from laconic.formats.kv_scheme import HeadGroup
from laconic.formats.kv_slot import slot_layout
from laconic.serving import paged
from laconic.serving.paged import PackedLayer, Scoring, attend, write
from laconic.solvers.rotate import hadamard

HEADS, QUERIES, CHANNELS, PER_PAGE = 2, 6, 32, 8
LENGTHS, NEW = (37, 5, 21), 5


def layer(keys: KvFormat, values: KvFormat, **rest: Any) -> PackedLayer:
    return PackedLayer([HeadGroup(keys, values)], {}, heads=HEADS, channels=CHANNELS, dtype=torch.float32, **rest)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paged_and_plain(packed: PackedLayer, scoring: Scoring, *, dirt: int = 0xFF) -> tuple[Tensor, Tensor]:
    """The last tokens of three sequences: by `attend`, whose free pages are dirt, and by plain softmax."""
    cache = torch.full((32, HEADS, PER_PAGE, packed.nbytes + 3), dirt, dtype=torch.uint8)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    table = order[: 3 * 8].view(3, 8)
    tokens, plain = [], []
    for i, length in enumerate(LENGTHS):
        q, k, v = (numbers(length, n, CHANNELS, seed=3 * i + j) for j, n in enumerate((QUERIES, HEADS, HEADS)))
        at = torch.arange(length)
        write(packed, cache, table[i][at // PER_PAGE] * PER_PAGE + at % PER_PAGE, k, v, at)
        tokens.append((q[-NEW:], k[-NEW:], v[-NEW:]))
        slots = packed.encode(k, v, at).transpose(0, 1)[None]
        stored_k, stored_v = (x[0].transpose(0, 1) for x in packed.decode(slots, at[None]))
        if packed.rotated:
            stored_v = hadamard(stored_v)
        if packed.rotates_queries:
            stored_k = hadamard(stored_k)
        for j in range(length - NEW, length):
            seen_k, seen_v = torch.cat([stored_k[:j], k[j : j + 1]]), torch.cat([stored_v[:j], v[j : j + 1]])
            groups = QUERIES // HEADS
            scores = torch.einsum("hd,thd->ht", q[j], seen_k.repeat_interleave(groups, 1)) * scoring.scale
            if scoring.softcap:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.slopes is not None:
                scores += scoring.slopes[:, None] * (torch.arange(j + 1) - j)
            if scoring.window is not None:
                scores[:, : max(0, j + 1 - scoring.window)] = -torch.inf
            plain.append(torch.einsum("ht,thd->hd", scores.softmax(-1), seen_v.repeat_interleave(groups, 1)))
    stacked = tuple(torch.stack(x) for x in zip(*tokens, strict=True))
    found = attend(packed, cache, table, torch.tensor(LENGTHS), max(LENGTHS), stacked, scoring)
    return found, torch.stack(plain).view(3, NEW, QUERIES, CHANNELS)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.2),
        Scoring(0.2, window=7),
        Scoring(0.2, softcap=3.0),
        Scoring(0.2, slopes=torch.linspace(0.1, 0.6, QUERIES)),
    ],
    ids=["plain", "window", "softcap", "alibi"],
)
@pytest.mark.parametrize("at_once", [1, 1 << 25])
def test_attention_is_that_over_what_was_stored(
    scoring: Scoring, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "_SCORES", at_once)
    found, plain = paged_and_plain(layer(KvFormat(4), KvFormat(3)), scoring)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("before_rotary", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_rotations_are_taken_back(rotated: bool, before_rotary: bool) -> None:
    turns = numbers(48, CHANNELS // 2).repeat(1, 2)
    angles = (turns.cos() * 1.1, turns.sin() * 1.1) if before_rotary else None
    packed = layer(KvFormat(2), KvFormat(2), rotated=rotated, angles=angles)
    found, plain = paged_and_plain(packed, Scoring(0.2))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_bytes_of_others_never_show() -> None:
    """Free pages, the rest of a last page, and bytes behind a slot may hold anything."""
    packed = layer(KvFormat(8, datatype="float"), KvFormat(2))
    first, second = (paged_and_plain(packed, Scoring(0.2), dirt=dirt)[0] for dirt in (0x7F, 0x00))
    assert torch.equal(first, second)


FORMATS = {
    "16": KvFormat(16),
    "8": KvFormat(8),
    "3, group 8": KvFormat(3, group_size=8),
    "2 with outliers": KvFormat(2, outlier_ratio=0.1),
    "4 symmetric": KvFormat(4, symmetric=True),
    "fp8": KvFormat(8, datatype="float", symmetric=True),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_slot_holds_what_was_stored(fmt: KvFormat) -> None:
    x, y = numbers(2, HEADS, 5, CHANNELS), numbers(2, HEADS, 5, CHANNELS, seed=1)
    layout = slot_layout(fmt, KvFormat(4), CHANNELS, torch.bfloat16)
    keys, values = encode_kv(fmt, x), encode_kv(KvFormat(4), y)
    slots = layout.pack(keys, values)
    assert slots.shape == (2, HEADS, 5, layout.nbytes)
    assert layout.nbytes - sum(t.nbytes for t in (*keys.values(), *values.values())) // (2 * HEADS * 5) < 2
    found_k, found_v = layout.unpack(torch.cat([slots, slots], -1))
    assert torch.equal(decode_kv(fmt, found_k, CHANNELS), decode_kv(fmt, keys, CHANNELS))
    assert torch.equal(decode_kv(KvFormat(4), found_v, CHANNELS), decode_kv(KvFormat(4), values, CHANNELS))


def test_ranges_that_tokens_share_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size: null"):
        slot_layout(KvFormat(2, axis="channel"), KvFormat(2), CHANNELS, torch.bfloat16)


def test_a_slot_of_two_bits_is_a_fifth_of_bf16() -> None:
    fmt = KvFormat(2, group_size=32)
    assert 4 * 64 / slot_layout(fmt, fmt, 64, torch.bfloat16).nbytes >= 5
