"""Attention over packed pages, against attention as it is written down, over what was stored."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic.kv.format import KvFormat, decode_kv, encode_kv
from laconic.kv.scheme import HeadGroup
from laconic.serving import paged_attention as paged
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import write_tokens
from laconic.serving.paged_attention import paged_attention
from laconic.serving.slot import slot_layout
from laconic.solvers.rotate import layer_rotations, rotate
from rotations import random_rotations

HEADS, QUERIES, CHANNELS, PER_PAGE = 2, 6, 32, 8
LENGTHS, NEW = (37, 6, 24), 5
# How texts came in before their last tokens did.
CUTS = ((3, 11, 12, 13, 29), (), (16,))


def layer(keys: KvFormat, values: KvFormat, **rest: Any) -> PagedLayer:
    return PagedLayer([HeadGroup(keys, values)], {}, heads=HEADS, channels=CHANNELS, dtype=torch.float32, **rest)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pages_of(packed: PagedLayer, count: int, page_tokens: int, dirt: int) -> Tensor:
    """Pages with other bytes between them, as where vLLM's pages of a layer are padded to those of another."""
    page = HEADS * page_tokens * packed.row_bytes
    whole = torch.full((count * (page + 48),), dirt, dtype=torch.uint8)
    strides = page + 48, page // HEADS, packed.row_bytes, 1
    return whole.as_strided((count, HEADS, page_tokens, packed.row_bytes), strides)


def run(packed: PagedLayer, cache: Tensor, part: SequenceBatch, tokens: tuple[Tensor, ...], scoring: Scoring) -> Tensor:
    q, k, v = tokens
    exact = write_tokens(packed, cache, part, k, v)
    return paged_attention(packed, cache, part, q, exact, scoring)


def stored(packed: PagedLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All of a text as it is stored, once all of its units are whole."""
    at = torch.arange(len(k))[None]
    found_k, found_v = packed.decode(*packed.encode(k.transpose(0, 1)[None], v.transpose(0, 1)[None], at), at)
    if packed.rotations:
        found_k = rotate(found_k, packed.rotations[0].mT) if packed.rotates_queries else found_k
        found_v = rotate(found_v, packed.rotations[1].mT)
    return found_k[0].transpose(0, 1), found_v[0].transpose(0, 1)


def paged_and_plain(packed: PagedLayer, scoring: Scoring, *, dirt: int = 0xFF) -> tuple[Tensor, Tensor]:
    """The last tokens of three texts: by pages, where all that was not written is dirt, and by plain softmax."""
    cache = pages_of(packed, 32, PER_PAGE, dirt)
    table = torch.randperm(32, generator=torch.Generator().manual_seed(1))[: 3 * 8].view(3, 8)
    last, plain = [], []
    for i, length in enumerate(LENGTHS):
        # More than the text, so that its last unit has an end.
        q, k, v = (numbers(40, n, CHANNELS, seed=3 * i + j) for j, n in enumerate((QUERIES, HEADS, HEADS)))
        for begin, end in pairwise((0, *CUTS[i], length - NEW)):
            some = slice(begin, end)
            part = SequenceBatch(table[i : i + 1], torch.tensor([end]), end, torch.arange(end - begin)[None])
            run(packed, cache, part, (q[None, some], k[None, some], v[None, some]), scoring)
        last.append([x[length - NEW : length] for x in (q, k, v)])
        stored_k, stored_v = stored(packed, k, v)
        for j in range(length - NEW, length):
            seen = torch.arange(j + 1)
            recent = max(0, j - packed.residual_length) // packed.unit * packed.unit
            exact = ((seen >= recent) | (seen < packed.sinks))[:, None, None]
            seen_k, seen_v = torch.where(exact, k[seen], stored_k[seen]), torch.where(exact, v[seen], stored_v[seen])
            each = QUERIES // HEADS
            scores = torch.einsum("hd,thd->ht", q[j], seen_k.repeat_interleave(each, 1)) * scoring.scale
            if scoring.softcap:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.slopes is not None:
                scores += scoring.slopes[:, None] * (seen - j)
            if scoring.window is not None:
                scores[:, : max(0, j + 1 - scoring.window)] = -torch.inf
            plain.append(torch.einsum("ht,thd->hd", scores.softmax(-1), seen_v.repeat_interleave(each, 1)))
    part = SequenceBatch(table, torch.tensor(LENGTHS), max(LENGTHS), torch.arange(3 * NEW).view(3, NEW))
    tokens = tuple(torch.stack(x) for x in zip(*last, strict=True))
    return run(packed, cache, part, tokens, scoring), torch.stack(plain).view(3, NEW, QUERIES, CHANNELS)


BY_CHANNEL = KvFormat(2, axis="channel", group_size=4)
LAYERS = {
    "by token": (KvFormat(4), KvFormat(3), {}),
    "by channel": (BY_CHANNEL, KvFormat(3), {"page_tokens": PER_PAGE}),
    "sinks": (KvFormat(2), KvFormat(2), {"sinks": 3, "page_tokens": PER_PAGE}),
    "by channel, sinks": (BY_CHANNEL, BY_CHANNEL, {"sinks": 5, "page_tokens": PER_PAGE}),
    "recent tokens": (KvFormat(2), KvFormat(2), {"residual_length": 3, "page_tokens": PER_PAGE}),
    "by channel, recent tokens, sinks": (
        BY_CHANNEL,
        KvFormat(3),
        {"residual_length": 10, "sinks": 2, "page_tokens": PER_PAGE},
    ),
}


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
@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
def test_attention_is_that_over_what_was_stored(
    made: tuple[KvFormat, KvFormat, dict[str, Any]], scoring: Scoring, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "_MAX_HELD", at_once)
    keys, values, rest = made
    found, plain = paged_and_plain(layer(keys, values, **rest), scoring)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("before_rotary", [False, True])
@pytest.mark.parametrize("rotation", [None, "hadamard", "attention"])
@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
def test_rotations_are_taken_back(
    made: tuple[KvFormat, KvFormat, dict[str, Any]], rotation: str | None, before_rotary: bool
) -> None:
    phases = numbers(48, CHANNELS // 2).repeat(1, 2)
    angles = (phases.cos() * 1.1, phases.sin() * 1.1) if before_rotary else None
    keys_rotation, values_rotation = random_rotations(HEADS, CHANNELS)
    found = layer_rotations(rotation, {"keys": keys_rotation, "values": values_rotation}, (CHANNELS, CHANNELS))
    keys, values, rest = made
    packed = layer(keys, values, rotations=found, rotary=angles, **rest)
    found, plain = paged_and_plain(packed, Scoring(0.2))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
def test_bytes_of_others_never_show(made: tuple[KvFormat, KvFormat, dict[str, Any]]) -> None:
    """Free pages, the rest of a last page, its tail, and bytes behind a slot may hold anything."""
    keys, values, rest = made
    packed = layer(keys, values, **rest)
    first, second = (paged_and_plain(packed, Scoring(0.2), dirt=dirt)[0] for dirt in (0x7F, 0x00))
    assert torch.equal(first, second)


FORMATS = {
    "16": KvFormat(16),
    "8": KvFormat(8),
    "3, group 8": KvFormat(3, group_size=8),
    "2 with outliers": KvFormat(2, outlier_ratio=0.1),
    "4 symmetric": KvFormat(4, symmetric=True),
    "by channel": KvFormat(3, axis="channel", group_size=4),
    "fp8": KvFormat(8, datatype="float", symmetric=True),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_slot_holds_what_was_stored(fmt: KvFormat) -> None:
    x, y = numbers(2, HEADS, 8, CHANNELS), numbers(2, HEADS, 8, CHANNELS, seed=1)
    layout = slot_layout(HeadGroup(fmt, KvFormat(4)), CHANNELS, torch.bfloat16)
    keys, values = encode_kv(fmt, x), encode_kv(KvFormat(4), y)
    slots, shared = layout.pack(keys, values)
    assert slots.shape == (2, HEADS, 8, layout.nbytes)
    assert shared.shape == (2, HEADS, 8 // layout.unit, layout.shared_nbytes)
    held = sum(t.nbytes for t in (*keys.values(), *values.values())) / (2 * HEADS * 8)
    assert layout.nbytes + layout.shared_nbytes / layout.unit - held < 2
    found_k, found_v = layout.unpack(torch.cat([slots, slots], -1), torch.cat([shared, shared], -1))
    assert torch.equal(decode_kv(fmt, found_k, CHANNELS), decode_kv(fmt, keys, CHANNELS))
    assert torch.equal(decode_kv(KvFormat(4), found_v, CHANNELS), decode_kv(KvFormat(4), values, CHANNELS))


def test_a_slot_of_two_bits_is_a_fifth_of_bf16() -> None:
    fmt = KvFormat(2, group_size=32)
    assert 4 * 64 / slot_layout(HeadGroup(fmt, fmt), 64, torch.bfloat16).nbytes >= 5


def test_pages_that_hold_no_whole_units_are_refused() -> None:
    with pytest.raises(ValueError, match="--block-size 24"):
        layer(KvFormat(2, axis="channel", group_size=12), KvFormat(2), page_tokens=16).row_bytes  # noqa: B018
