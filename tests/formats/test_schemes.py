"""Schemes: what a preset may be varied to, and that anything else is refused with a reason."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from laconic.formats.schemes import PRESETS, Scheme, scheme

every_preset = pytest.mark.parametrize("preset", PRESETS)

VARIATIONS = [
    dict(zip(("group_size", "symmetric", "strategy", "dynamic"), values, strict=True))
    for values in product(
        (None, -1, 32, 128, 0, -2),
        (None, True, False),
        (None, "tensor", "channel", "group", "block"),
        (None, True, False),
    )
]


def varied(preset: str, **variation: Any) -> Scheme | None:
    """The varied preset, or None where it cannot be varied so."""
    try:
        return scheme(preset, **variation)
    except ValueError:
        return None


@every_preset
def test_a_preset_not_varied_is_itself(preset: str) -> None:
    assert scheme(preset) == PRESETS[preset]


@every_preset
def test_a_variation_is_refused_or_is_what_was_asked_for(preset: str) -> None:
    for asked in VARIATIONS:
        if made := varied(preset, **asked):
            weights, acts = made.weights, made.input_activations
            assert asked["group_size"] in (None, weights.tiling.group_size or -1)
            assert asked["symmetric"] in (None, weights.symmetric)
            assert asked["strategy"] in (None, weights.tiling.strategy)
            assert asked["dynamic"] in (None, acts and acts.dynamic)
            assert made.storage == PRESETS[preset].storage
            assert made.name == preset


@every_preset
def test_saying_what_a_preset_is_already_changes_nothing(preset: str) -> None:
    own = PRESETS[preset]
    assert scheme(preset, symmetric=own.weights.symmetric) == own
    if own.input_activations:
        assert scheme(preset, dynamic=own.input_activations.dynamic) == own
    if own.weights.tiling.group_size:
        assert scheme(preset, group_size=own.weights.tiling.group_size, strategy="group") == own
    elif own.weights.tiling.strategy != "block":
        assert scheme(preset, strategy=own.weights.tiling.strategy) == own


@pytest.mark.parametrize(
    ("preset", "variation", "reason"),
    [
        ("W5A5", {}, "unknown scheme 'W5A5': choose one of W8A16, "),
        ("W4A16", {"strategy": "block"}, "strategy 'block' is not one of tensor, channel, group"),
        ("W4A16", {"strategy": "channel", "group_size": 32}, "group_size 32 contradicts strategy 'channel'"),
        ("W4A16", {"strategy": "group", "group_size": -1}, "group_size -1 contradicts strategy 'group'"),
        ("W8A8", {"strategy": "tensor", "group_size": -1}, "group_size -1 contradicts strategy 'tensor'"),
        ("W4A16", {"group_size": 0}, "group_size must be at least 1"),
        ("W4A16", {"group_size": -3}, "group_size must be at least 1"),
        ("W4A16", {"strategy": "tensor"}, "W4A16 is stored by channel or by group"),
        ("W6A6", {"strategy": "tensor"}, "W6A6 is stored by channel or by group"),
        ("W4A8", {"strategy": "tensor"}, "W4A8 is stored by channel or by group"),
        ("W4A16", {"dynamic": True}, "W4A16 keeps activations in 16 bit"),
        ("W4A16", {"dynamic": False}, "W4A16 keeps activations in 16 bit"),
        ("W8A8", {"group_size": 128}, "W8A8 has no groups"),
        ("W8A8", {"strategy": "group"}, "W8A8 has no groups"),
        ("W8A8", {"symmetric": False}, "W8A8 computes in integers and needs symmetric weights"),
        ("W4A8", {"symmetric": False}, "W4A8 computes in integers and needs symmetric weights"),
        ("W4A8", {"dynamic": False}, "W4A8 has dynamic activations only"),
        ("FP8", {"group_size": 128}, "FP8 has no groups"),
        ("FP8", {"symmetric": False}, "FP8 is always symmetric"),
        ("FP8_BLOCK", {"strategy": "channel"}, "FP8_BLOCK is 128 x 128 blocks"),
        ("FP8_BLOCK", {"group_size": 64}, "FP8_BLOCK has no groups"),
        ("FP8_BLOCK", {"dynamic": False}, "FP8_BLOCK has dynamic activations only"),
        ("NVFP4", {"group_size": 32}, "NVFP4 is groups of 16: leave group_size and strategy out"),
        ("MXFP4A16", {"group_size": -1}, "MXFP4A16 is groups of 32: leave group_size and strategy out"),
        ("MXFP4", {"strategy": "channel"}, "MXFP4 is groups of 32: leave group_size and strategy out"),
        ("NVFP4A16", {"symmetric": False}, "NVFP4A16 is always symmetric"),
        ("NVFP4A16", {"dynamic": True}, "NVFP4A16 keeps activations in 16 bit"),
        ("NVFP4", {"dynamic": True}, "NVFP4 quantizes activations in its own way: leave 'dynamic' out"),
        ("MXFP4", {"dynamic": False}, "MXFP4 quantizes activations in its own way: leave 'dynamic' out"),
    ],
    ids=str,
)
def test_an_invalid_variation_is_refused_with_the_reason(preset: str, variation: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scheme(preset, **variation)
