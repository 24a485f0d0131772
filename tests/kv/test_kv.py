"""What a cache stores of keys and values, against plain definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laconic.kv.format import KvFormat, decode_kv, encode_kv
from laconic.kv.scheme import HeadGroup, KvScheme, tokens_at_once, uniform


def numbers(tokens: int = 8, channels: int = 16, heads: int = 2) -> Tensor:
    x = torch.randn(3, heads, tokens, channels, generator=torch.Generator().manual_seed(0))
    x[..., 3] += 7  # a channel that is loud in every token
    return x


def round_trip(fmt: KvFormat, x: Tensor, static: dict[str, Tensor] | None = None) -> Tensor:
    return decode_kv(fmt, encode_kv(fmt, x, static, torch.float32), x.shape[-1], static)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize(("axis", "group_size"), [("token", 16), ("token", 8), ("channel", 4), ("channel", 8)])
def test_a_range_is_that_of_its_group(num_bits: int, axis: str, group_size: int) -> None:
    x = numbers()
    found = round_trip(KvFormat(num_bits, axis, group_size), x)  # type: ignore[arg-type]
    tiles = x.double().transpose(2, 3) if axis == "channel" else x.double()
    tiles = tiles.unflatten(3, (-1, group_size))
    lo, hi = tiles.amin(-1, keepdim=True), tiles.amax(-1, keepdim=True)
    step = ((hi - lo) / (2**num_bits - 1)).half().double()
    low = lo.half().double()
    expected = (((tiles - low) / step).round().clamp(0, 2**num_bits - 1) * step + low).flatten(3)
    expected = expected.transpose(2, 3) if axis == "channel" else expected
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@given(num_bits=st.integers(2, 8), group=st.sampled_from([4, 8, 16]), scale=st.floats(0.1, 1e3))
@settings(max_examples=25)
def test_the_error_is_at_most_half_a_step(num_bits: int, group: int, scale: float) -> None:
    x = numbers() * scale
    for fmt in (KvFormat(num_bits, "token", group), KvFormat(num_bits, "token", group, symmetric=True)):
        tiles = x.unflatten(-1, (-1, group))
        reach = tiles.amax(-1) - tiles.amin(-1) if not fmt.symmetric else 2 * tiles.abs().amax(-1)
        levels = 2**num_bits - 1 if not fmt.symmetric else 2**num_bits - 2
        bound = (reach / levels / 2 + reach * 2e-3).unsqueeze(-1)
        assert ((round_trip(fmt, x) - x).unflatten(-1, (-1, group)).abs() <= bound).all()


def test_keys_by_channel_keep_what_a_loud_channel_drowns_by_token() -> None:
    x = numbers(32)
    by_channel = (round_trip(KvFormat(2, "channel", 32), x) - x).square().mean()
    by_token = (round_trip(KvFormat(2, "token", 16), x) - x).square().mean()
    assert by_channel < 0.5 * by_token


@pytest.mark.parametrize("fmt", [KvFormat(3, "token", 16), KvFormat(3, "channel", 8)], ids=str)
def test_outliers_come_back_as_they_were(fmt: KvFormat) -> None:
    x = numbers()
    x[:, :, 2, 5] = 400.0
    with_outliers = KvFormat(fmt.num_bits, fmt.axis, fmt.group_size, outlier_ratio=0.05)
    stored = encode_kv(with_outliers, x, None, torch.float32)
    assert stored["outlier_index"].shape == (3, 2, 8, 1)
    assert (stored["outlier_index"][:, :, 2] == 5).all()
    back = decode_kv(with_outliers, stored, 16)
    assert (back[:, :, 2, 5] == 400).all()
    # Those that share its range are no longer stretched by it.
    tokens, channels = ([0, 1, 3, 4, 5, 6, 7], [5]) if fmt.axis == "channel" else ([2], [0, 1, 2, 4, 6])
    near = (back - x)[:, :, tokens][..., channels].abs().max()
    far = (round_trip(fmt, x) - x)[:, :, tokens][..., channels].abs().max()
    assert near < 0.4 * far


def test_a_table_gives_the_nearest_level() -> None:
    levels = torch.tensor([-1.0, -0.2, 0.1, 1.0])
    static = {"scale": torch.full((2, 16), 2.0), "offset": torch.full((2, 16), 0.5), "levels": levels}
    x = numbers()
    found = round_trip(KvFormat(2, "channel", None, "table"), x, static)
    u = (x - 0.5) / 2
    expected = levels[(u.unsqueeze(-1) - levels).abs().argmin(-1)] * 2 + 0.5
    torch.testing.assert_close(found, expected)


def test_fp8_is_torchs_own() -> None:
    x, scale = numbers(), torch.full((1, 1), 0.1)
    found = round_trip(KvFormat(8, "token", None, "float", symmetric=True), x, {"scale": scale})
    torch.testing.assert_close(found, (x / 0.1).to(torch.float8_e4m3fn).float() * 0.1)


def test_sixteen_bits_are_left_alone() -> None:
    x = numbers().bfloat16()
    stored = encode_kv(KvFormat(16), x)
    assert list(stored) == ["plain"]
    assert torch.equal(decode_kv(KvFormat(16), stored, 16), x)


def test_bytes_are_those_of_the_bits() -> None:
    x = numbers(64, 64)
    stored = encode_kv(KvFormat(2, "channel", 32), x)
    assert stored["codes"].nbytes == x.numel() * 2 // 8
    assert stored["scale"].nbytes + stored["offset"].nbytes == x.numel() // 32 * 4


@pytest.mark.parametrize(
    ("fmt", "channels", "told"),
    [
        (KvFormat(4, "token", 48), 64, "use 64 or 32"),
        (KvFormat(3, "token", 12), 12, "multiple of 8"),
        (KvFormat(4, "token", 32, outlier_ratio=0.1), 512, "at most 256 channels, and these have 512"),
    ],
)
def test_heads_that_do_not_fit_are_refused(fmt: KvFormat, channels: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fmt.check(channels)


@pytest.mark.parametrize(
    "wrong", [{"num_bits": 9}, {"num_bits": 0}, {"group_size": 0}, {"outlier_ratio": 0.5}, {"datatype": "float"}]
)
def test_formats_that_are_none_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"bits|group_size|outlier_ratio"):
        KvFormat(**wrong)


def test_a_scheme_survives_json() -> None:
    import json

    groups = (
        HeadGroup(KvFormat(4, "channel", 32), KvFormat(2), (0, 2)),
        HeadGroup(KvFormat(16), KvFormat(8, "token", None, "float", symmetric=True), (1,)),
    )
    scheme = KvScheme("kivi", (groups, groups), 128, 4, "hadamard", True, "abc")
    assert KvScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert tokens_at_once(groups) == 32
    assert scheme.calibrated
    scheme.check(2, 3, 64)
    with pytest.raises(ValueError, match="does not name each"):
        scheme.check(2, 4, 64)
    with pytest.raises(ValueError, match="has 2 layers and the model 3"):
        scheme.check(3, 3, 64)
    with pytest.raises(ValueError, match="power of two"):
        scheme.check(2, 3, 96)
    with pytest.raises(ValueError, match="cannot be read"):
        KvScheme.from_dict({"layers": [[{"keys": {"bits": 3}}]]})


def test_the_same_everywhere() -> None:
    scheme = uniform("x", KvFormat(4), KvFormat(2), 3, sinks=1)
    assert len(scheme.layers) == 3
    assert not scheme.calibrated
