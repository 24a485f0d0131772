"""Bytes as counted by hand, and a speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Cache, PreTrainedModel

from artifacts import original
from laconic.evaluation.cache_cost import memory_by_length, speed_by_length
from laconic.evaluation.through_cache import PLAIN, plain_cache
from laconic.kv.attach import make_cache
from laconic.kv.format import KvFormat
from laconic.kv.scheme import uniform
from tiny import make_model

LAYERS, HEADS, CHANNELS = 2, 2, 16
NUMBERS = 2 * LAYERS * HEADS * CHANNELS
"""Of keys and values, a token."""


@pytest.fixture(scope="module")
def model(llama: Path) -> PreTrainedModel:
    return original(llama)


def both(model: PreTrainedModel, bits: int, **rest: int | bool) -> dict[str, Callable[[], Cache]]:
    scheme = uniform("test", KvFormat(bits, "channel", 32), KvFormat(bits, "token", 16), LAYERS, **rest)
    return {PLAIN: partial(plain_cache, model), "ours": partial(make_cache, model, scheme)}


def test_bytes_are_those_of_a_hand_count(model: PreTrainedModel) -> None:
    found = memory_by_length(model, both(model, 4, residual_length=20), [200], batch=5)
    # 180 have left the window of 20; 160 of them fill groups of 32, the other 40 wait in 16 bit.
    half = NUMBERS // 2
    codes = 160 * NUMBERS * 4 // 8
    key_ranges = 160 // 32 * half * 2 * 2
    value_ranges = 160 * half // 16 * 2 * 2
    window = 40 * NUMBERS * 2
    (ours,), (plain,) = found["ours"], found[PLAIN]
    assert ours.request_bytes == codes + key_ranges + value_ranges + window
    assert plain.request_bytes == 200 * NUMBERS * 2
    assert (ours.batch_bytes, plain.batch_bytes) == (5 * ours.request_bytes, 5 * plain.request_bytes)
    assert plain.bits == 16
    assert ours.bits == pytest.approx(8 * ours.request_bytes / (200 * NUMBERS))


def test_positions_are_counted_once_a_batch(model: PreTrainedModel) -> None:
    schemes = [both(model, 4, pre_rope=freed) for freed in (False, True)]
    plain, freed = (memory_by_length(model, scheme, [64], batch=3)["ours"][0] for scheme in schemes)
    assert freed.request_bytes - plain.request_bytes == freed.batch_bytes - plain.batch_bytes == 64 * 4


def test_bytes_are_of_16_bit_numbers_whatever_is_computed_in(model: PreTrainedModel, llama: Path) -> None:
    wide = original(llama, torch.float32)
    assert memory_by_length(wide, both(wide, 2), [100]) == memory_by_length(model, both(model, 2), [100])


def test_a_sliding_window_keeps_what_it_sees(tmp_path: Path) -> None:
    mistral = original(make_model(tmp_path / "mistral", "mistral"))
    found = memory_by_length(mistral, {PLAIN: partial(plain_cache, mistral)}, [8, 100, 200])[PLAIN]
    assert found[1].request_bytes == found[2].request_bytes
    assert [m.bits for m in found] == [16, 16, 16]


def test_speed_is_of_every_length(model: PreTrainedModel) -> None:
    found = speed_by_length(model, both(model, 4), [16, 64], steps=2, batch=3)
    for row in found.values():
        assert [s.length for s in row] == [16, 64]
        assert all(s.tokens_per_second == pytest.approx(3000 / s.milliseconds) for s in row)
