"""Attention over a packed cache: the reference against torch in float64, the Triton kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from laconic.kv.attention import kv_attention, kv_attention_torch
from laconic.kv.format import KvFormat, decode_kv, encode_kv
from laconic.kv.packed import (
    MAX_QUERIES,
    KeysValues,
    PackedHistory,
    PackedTokens,
    kernel_reads,
    kernel_reads_scheme,
)
from laconic.kv.positions import RotaryAngles
from laconic.kv.scheme import uniform

BATCH, HEADS = 2, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter does not multiply bfloat16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
Problem = dict[str, Any]


def packed(fmt: KvFormat, tokens: int, channels: int, generator: torch.Generator) -> PackedTokens:
    """Random numbers, stored: channels far from zero and of very different size, as keys have them."""
    spread = torch.linspace(-2, 2, channels).exp()
    x = torch.randn(BATCH, HEADS, tokens, channels, generator=generator) * spread + spread.flip(0)
    static = {}
    if fmt.datatype == "table":
        static["levels"] = torch.linspace(-1, 1, 2**fmt.num_bits).pow(3).to(DEVICE)
    if fmt.group_size is None:
        static["scale"] = (x.abs().amax((0, 2)) / 2 ** (fmt.num_bits - 1)).to(DEVICE)
        static["offset"] = x.amin((0, 2)).to(DEVICE) if fmt.datatype == "int" else x.mean((0, 2)).to(DEVICE)
    return PackedTokens(fmt, encode_kv(fmt, x.to(DEVICE), static), static)


def angles(rows: int, tokens: int, channels: int) -> RotaryAngles:
    """Of so many rows, each a little further on in its text."""
    positions = torch.arange(tokens) + 3 * torch.arange(rows)[:, None]
    turns = positions[..., None] * 100.0 ** -torch.linspace(0, 1, channels // 2)
    return turns.cos().half().to(DEVICE), turns.sin().half().to(DEVICE)


def problem(
    keys: KvFormat,
    values: KvFormat,
    *,
    tokens: int = 64,
    channels: int = 64,
    rep: int = 4,
    window: int = 5,
    sinks: int = 0,
    new: int = 1,
    starts: list[int] | None = None,
    turned: int = 0,
    seed: int = 0,
) -> Problem:
    """What `kv_attention` takes."""
    generator = torch.Generator().manual_seed(seed)

    def pair(count: int) -> KeysValues:
        k, v = torch.randn(2, BATCH, HEADS, count, channels, generator=generator).to(DEVICE, HALF)
        return k, v

    q = torch.randn(BATCH, HEADS * rep, new, channels, generator=generator).to(DEVICE)
    history = PackedHistory(
        keys=packed(keys, tokens, channels, generator),
        values=packed(values, tokens, channels, generator),
        window=pair(window),
        sinks=pair(sinks) if sinks else None,
        first_B=None if starts is None else torch.tensor(starts, device=DEVICE),
        angles=angles(turned, tokens, channels) if turned else None,
    )
    return {"q_BQNC": q, "history": history}


# The reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [KvFormat(3, "channel", 32), KvFormat(4, outlier_ratio=0.02)], ids=["plain", "apart"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize(("new", "starts"), [(1, None), (4, [0, 62])])
def test_reference_is_attention_over_what_was_stored(
    keys: KvFormat, sinks: int, scaling: float | None, new: int, starts: list[int] | None
) -> None:
    given = problem(keys, KvFormat(4, "token", 32), sinks=sinks, new=new, starts=starts)
    whole = []
    for which, name in enumerate(("keys", "values")):
        side = getattr(given["history"], name)
        x = decode_kv(side.fmt, side.stored, 64).double()
        for row, start in enumerate(starts or [0, 0]) if sinks else ():
            sunk = min(sinks, 64 - start)
            x[row, :, start : start + sunk] = given["history"].sinks[which][row, :, :sunk].double()
        whole.append(torch.cat([x, given["history"].window[which].double()], 2).repeat_interleave(4, 1))
    mask = torch.ones(new, 69, dtype=torch.bool, device=DEVICE).tril(69 - new).repeat(BATCH, 1, 1, 1)
    for row, start in enumerate(starts or ()):
        mask[row, ..., :start] = False
    expected = scaled_dot_product_attention(given["q_BQNC"].double(), *whole, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(kv_attention_torch(**given, scaling=scaling).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_read_goes_to_the_reference() -> None:
    given = problem(KvFormat(4, outlier_ratio=0.2), KvFormat(4))
    torch.testing.assert_close(kv_attention(**given), kv_attention_torch(**given), rtol=0, atol=0)


def test_supports_says_which_schemes_the_kernel_reads() -> None:
    keys, values = KvFormat(2, "channel", 32), KvFormat(2, "token", 32)
    assert kernel_reads_scheme(uniform("kivi", keys, values, 2, residual_length=32, sinks=4), 128)
    assert kernel_reads_scheme(uniform("kivi", keys, values, 2, rotation="hadamard"), 128)
    assert kernel_reads_scheme(uniform("kvquant", keys, values, 2, pre_rope=True), 128)
    assert not kernel_reads_scheme(uniform("kvquant", keys, values, 2, pre_rope=True, rotation="hadamard"), 128)
    assert not kernel_reads_scheme(uniform("kivi", KvFormat(16), values, 2), 128)
    assert not kernel_reads_scheme(uniform("kivi", keys, values, 2), 96)
    assert kernel_reads(KvFormat(2, outlier_ratio=0.01), 128)
    assert not kernel_reads(KvFormat(2, outlier_ratio=0.1), 128)
    assert not kernel_reads(KvFormat(2, "channel", 8), 128), "a block of tokens shares no range"
    assert not kernel_reads(KvFormat(2, "token", 8), 128), "a product would be half empty"
    assert not kernel_reads(KvFormat(1), 64), "a plane has too few bytes"


# The kernel -----------------------------------------------------------------------------------------------------------

Attention = Callable[..., Tensor]


@pytest.fixture(scope="module")
def kernel(on_triton: Callable[..., Any]) -> Attention:
    """The Triton kernel."""
    from laconic.kv.attention_triton import kv_attention_triton

    return partial(on_triton, kv_attention_triton)


def agree(kernel: Attention, given: Problem, **rest: Any) -> None:
    """Within what probabilities and scaled queries lose in float16, against values as large as they are."""
    ours, expected = kernel(**given, **rest), kv_attention_torch(**given)
    assert ours.dtype == expected.dtype
    size = (
        decode_kv(
            given["history"].values.fmt,
            given["history"].values.stored,
            expected.shape[-1],
            given["history"].values.static,
        )
        .abs()
        .max()
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-3 * max(1.0, float(size)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("k_axis", "v_axis"), [("channel", "token"), ("token", "channel")])
def test_kernel_reads_every_width_along_either_axis(kernel: Attention, bits: int, k_axis: Any, v_axis: Any) -> None:
    given = problem(KvFormat(bits, k_axis, 32), KvFormat(bits, v_axis, 32), channels=128, rep=2)
    agree(kernel, given, splits=2)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(
    "rest",
    [
        {"group_size": 32, "symmetric": True},
        {"group_size": None},
        {"group_size": 32, "datatype": "table"},
        {"group_size": 32, "datatype": "table", "symmetric": True},
        {"group_size": None, "datatype": "table"},
        {"num_bits": 8, "group_size": 32, "datatype": "float"},
        {"num_bits": 8, "group_size": 32, "datatype": "float", "symmetric": True},
    ],
    ids=lambda rest: "-".join(map(str, rest.values())),
)
def test_kernel_reads_every_datatype(kernel: Attention, axis: Any, rest: dict[str, Any]) -> None:
    fmt = KvFormat(**{"num_bits": 4, "axis": axis, **rest})
    agree(kernel, problem(fmt, fmt), splits=2)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(
    "rest",
    [
        {"num_bits": 3, "group_size": 32, "datatype": "table"},
        {"num_bits": 4, "group_size": None},
        {"num_bits": 4, "group_size": 32, "symmetric": True},
        {"num_bits": 8, "group_size": 32, "datatype": "float"},
    ],
    ids=lambda rest: "-".join(map(str, rest.values())),
)
def test_kernel_reads_numbers_stored_apart(kernel: Attention, axis: Any, rest: dict[str, Any]) -> None:
    fmt = KvFormat(axis=axis, outlier_ratio=0.03, **rest)
    given = problem(fmt, fmt, channels=64 if fmt.num_bits == 4 else 128, rep=2)
    assert given["history"].keys.stored["outlier_index"].shape[-1] > 1
    agree(kernel, given, splits=2)


@pytest.mark.parametrize(
    ("fmt", "rows"),
    [
        (KvFormat(3, "channel", 32, "table", outlier_ratio=0.01), 1),
        (KvFormat(3, "channel", 32, "table", outlier_ratio=0.01), BATCH),
        (KvFormat(2, "channel", 32), BATCH),
        (KvFormat(3, "token", 16, outlier_ratio=0.02), BATCH),
        (KvFormat(4, "channel", None), BATCH),
        (KvFormat(8, "token", 64), 1),
        (KvFormat(8, "channel", 32, "float", symmetric=True), BATCH),
    ],
    ids=str,
)
def test_kernel_turns_keys_from_before_their_rotary_embedding(kernel: Attention, fmt: KvFormat, rows: int) -> None:
    given = problem(fmt, KvFormat(4), channels=128, rep=2, turned=rows, starts=[0, 5], sinks=2)
    unturned = kv_attention_torch(given["q_BQNC"], replace(given["history"], angles=None))
    assert (unturned - kv_attention_torch(**given)).abs().max() > 0.1, "turning does nothing: the test shows nothing"
    agree(kernel, given, splits=2)


def test_kernel_reads_keys_and_values_of_different_formats(kernel: Attention) -> None:
    agree(kernel, problem(KvFormat(4, "channel", 64), KvFormat(2, "token", 16), rep=1))


@settings(max_examples=16, deadline=None)
@given(
    tokens=st.integers(1, 70),
    window=st.integers(0, 70),
    new=st.integers(1, 5),
    starts=st.none() | st.lists(st.integers(0, 140), min_size=BATCH, max_size=BATCH),
    sinks=st.integers(0, 40),
    rep=st.sampled_from([1, 3, 4, 12]),
    group_size=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_kernel_takes_any_number_of_tokens(
    kernel: Attention,
    tokens: int,
    window: int,
    new: int,
    starts: list[int] | None,
    sinks: int,
    rep: int,
    group_size: int,
    splits: int,
    seed: int,
) -> None:
    fmt = KvFormat(4, "token", group_size)
    new = min(new, MAX_QUERIES // rep)
    window = max(window, new if new > 1 or starts else 0)
    # A query sees itself at least.
    starts = None if starts is None else [min(start, tokens + window - new) for start in starts]
    given = problem(fmt, fmt, tokens=tokens, window=window, sinks=sinks, new=new, starts=starts, rep=rep, seed=seed)
    agree(kernel, given, splits=splits)


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_kernel_takes_values_of_any_size(kernel: Attention, size: float) -> None:
    """Neither do scales times probabilities vanish in float16, nor do they overflow it."""
    given = problem(KvFormat(4, "channel", 32), KvFormat(4, "token", 32), window=0)
    for name in ("scale", "offset"):
        given["history"].values.stored[name] *= size
    expected = kv_attention_torch(**given)
    torch.testing.assert_close(kernel(**given), expected, rtol=0, atol=3e-3 * float(expected.abs().max()))


def test_kernel_reads_caches_that_lie_in_larger_ones(kernel: Attention) -> None:
    fmt = KvFormat(4, "token", 32)
    whole = problem(fmt, fmt, tokens=48, window=9)
    history = whole["history"]
    keys, values = (
        PackedTokens(fmt, {n: t[:, :, :33] for n, t in side.stored.items()}) for side in (history.keys, history.values)
    )
    k, v = (w[:, :, 2:] for w in history.window)
    agree(kernel, {**whole, "history": PackedHistory(keys, values, (k, v))})


def test_kernel_scales_logits_as_it_is_told(kernel: Attention) -> None:
    given = problem(KvFormat(4), KvFormat(4))
    expected = kv_attention_torch(**given, scaling=0.02)
    assert (expected - kv_attention_torch(**given)).abs().max() > 0.1, (
        "the scaling does nothing: the test shows nothing"
    )
    torch.testing.assert_close(kernel(**given, scaling=0.02), expected, rtol=0, atol=3e-2)
