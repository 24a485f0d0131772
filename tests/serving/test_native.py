"""Products of native linears in the plugin, without vLLM: side products around codes, and codes that stay packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic.bench.timing import capture_graph
from laconic.formats import LowRank, Outliers, Quantized, quantize
from laconic.formats.rotation import rotate_by_factors, rotate_channels, rotation_factors
from laconic.formats.schemes import Scheme, scheme
from laconic.runtime.products import round_activations
from laconic.serving import packed_linear as packed
from laconic.serving.shards import Shard, Span
from laconic.serving.side_tensors import SideTensors, StoredSides, add_side_products_torch

COLUMNS = 256
LOUD = [3, 77, 255]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu" if request.param == "cpu" else request.getfixturevalue("cuda"))


def linear(kept: Scheme, rows: int, device: torch.device, seed: int, right: int = 0) -> Quantized:
    """right: seed of the right factor of the product."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, COLUMNS, generator=generator)
    q = quantize(kept.weights, w.to(device), kept.weights.fit(w.to(device), torch.bfloat16))
    if kept.outlier_columns:
        q = replace(q, outliers=Outliers(torch.tensor(LOUD, device=device).int(), w[:, LOUD].bfloat16().to(device)))
    if kept.rank:
        R = torch.randn(kept.rank, COLUMNS, generator=torch.Generator().manual_seed(right))
        L = torch.randn(rows, kept.rank, generator=generator)
        q = replace(q, low_rank=LowRank(L.bfloat16().to(device), R.bfloat16().to(device)))
    return q


def loud_input(device: torch.device) -> Tensor:
    x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(9))
    x[..., LOUD] *= 20
    return x.bfloat16().to(device)


def near(y: Tensor, expected: Tensor) -> bool:
    return bool((y.double() - expected).norm() < 0.005 * expected.norm())


@pytest.mark.parametrize("rights", [(0, 0), (0, 1)], ids=["one factor", "two factors"])
@pytest.mark.parametrize(("columns", "rank"), [(3, 0), (0, 4), (3, 5)])
def test_side_products_around_codes_are_the_whole_weight(
    columns: int, rank: int, rights: tuple[int, int], device: torch.device
) -> None:
    """Also of fused linears, and with padding after their outputs."""
    kept = replace(scheme("W4A16", group_size=32), outlier_columns=columns, rank=rank)
    parts = [linear(kept, rows, device, rows, right) for rows, right in zip((24, 16), rights, strict=True)]
    stored = [StoredSides(q.shape, q.outliers, q.low_rank) for q in parts]
    sides = SideTensors.combine(stored, 48, torch.bfloat16)
    assert sides is not None
    assert sides.weight.shape[1] % 8 == 0
    x = loud_input(device)
    codes = torch.cat([q.format.decode(q.codes, q.params, q.shape) for q in parts])
    codes = torch.nn.functional.pad(codes, (0, 0, 0, 8))

    def product() -> Tensor:
        return sides.add_to(sides.coded_input(x) @ codes.bfloat16().T, x)

    expected = x.double() @ torch.cat([q.decode() for q in parts]).double().T
    y = product()
    assert near(y[..., :40], expected)
    assert not y[..., 40:].any()
    if device.type == "cuda":
        # A capture fails where the host waits for the device.
        capture_graph(product)()


def side_products(tokens: int, outputs: int, columns: int, rank: int) -> float:
    """The error of the kernel, where Triton runs."""
    from laconic.serving.side_triton import add_side_products_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    y, x, weight, projected = (
        torch.randn(shape, generator=generator).half().to(device)
        for shape in ((tokens, outputs), (tokens, COLUMNS), (outputs, columns + rank), (tokens, rank))
    )
    indices = torch.randperm(COLUMNS, generator=generator)[:columns].to(device) if columns else None
    options = projected if rank else None, indices, weight
    expected = add_side_products_torch(
        y.float(), x.float(), *(t if t is None or not t.is_floating_point() else t.float() for t in options)
    )
    return float((add_side_products_triton(y, x, *options).float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("tokens", "outputs", "columns", "rank"), [(1, 40, 8, 0), (5, 96, 0, 16), (33, 72, 80, 24), (70, 33, 41, 7)]
)
def test_the_kernel_adds_the_side_products(
    tokens: int, outputs: int, columns: int, rank: int, on_triton: Callable[..., Any]
) -> None:
    assert on_triton(side_products, tokens, outputs, columns, rank) < 1e-3


def test_linears_without_side_tensors_have_no_side_product() -> None:
    parts = [StoredSides((4, 8)), StoredSides((4, 8), Outliers(torch.empty(0).int(), torch.empty(4, 0)))]
    assert SideTensors.combine(parts[:1], 4, torch.float32) is None
    assert SideTensors.combine(parts[1:], 4, torch.float32) is None
    with pytest.raises(ValueError, match="different outlier columns"):
        SideTensors.combine(parts, 8, torch.float32)


@pytest.mark.parametrize(
    "kept",
    [
        replace(scheme("W8A8"), outlier_columns=3),
        replace(scheme("W8A8", dynamic=False, strategy="tensor"), outlier_columns=3),
        replace(scheme("W4A16_ASYM", group_size=32), outlier_columns=3, rank=4),
        replace(scheme("W6A6"), outlier_columns=3, rank=4),
        scheme("FP8_BLOCK"),
        scheme("NVFP4"),
    ],
    ids=lambda s: s.title,
)
def test_a_packed_layer_computes_its_weight_and_keeps_no_other(
    kept: Scheme, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_CHUNK", 16 * COLUMNS)
    parts = [linear(kept, rows, device, rows) for rows in (40, 24)]
    acts = kept.input_activations
    ends = torch.tensor(-50.0, device=device), torch.tensor(50.0, device=device)
    calibrated = dict(acts.calibrate(*ends, torch.bfloat16)) if acts else {}
    layout, tensors = packed.pack(kept, parts, calibrated)
    stored = sum(t.nbytes for q in parts for t in q.to_tensors().values())
    # Each chunk has the size of its weight and indices of outlier columns beside it.
    assert sum(t.nbytes for t in tensors) <= stored + 64 * len(tensors)
    x, bias = loud_input(device), torch.randn(64, device=device).bfloat16()

    def product() -> Tensor:
        result: Tensor = packed.packed_linear(x, tensors, bias, layout.key, layout.rows)
        return result

    exempt = torch.tensor(LOUD, device=device) if kept.outlier_columns else None
    rounded = x if acts is None else round_activations(x, acts, calibrated, exempt)
    expected = rounded.double() @ torch.cat([q.decode() for q in parts]).double().T + bias.double()
    assert near(product(), expected)
    meta = packed.packed_linear(x.to("meta"), [t.to("meta") for t in tensors], None, layout.key, layout.rows)
    assert (meta.shape, meta.dtype) == (expected.shape, x.dtype)
    if device.type == "cuda":
        capture_graph(product)()


def test_linears_that_are_stored_as_one_are_cut_as_several() -> None:
    kept = replace(scheme("W4A16", group_size=32), outlier_columns=3, rank=2)
    fused = linear(kept, 48, torch.device("cpu"), 0)
    shard = Shard((Span(16, 32, 32), Span(8, 16, 16)), Span(128, 256, 256))
    shares = shard.cut([fused])
    whole = fused.decode()
    for share, rows in zip(shares, (whole[16:32], whole[40:48]), strict=True):
        torch.testing.assert_close(share.decode(), rows[:, 128:], rtol=1e-5, atol=1e-5)


def test_a_matrix_that_transforms_channels_cannot_be_cut() -> None:
    kept = replace(scheme("W4A16"), input_transform=2)
    Shard((Span(0, 8, 16),), Span(0, 256, 256)).check(kept, "up_proj")
    with pytest.raises(ValueError, match=r"cannot cut the inputs of up_proj, .* --tensor-parallel-size 1"):
        Shard((Span(0, 16, 16),), Span(0, 128, 256)).check(kept, "up_proj")


@pytest.mark.parametrize("channels", [6, 56, 256, 1792])
def test_two_factors_are_the_rotation(channels: int) -> None:
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_by_factors(x, *rotation_factors(channels)), rotate_channels(x))
