"""What is kept beside the codes: decoded, cut, stored and read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from laconic.formats import LowRank, Outliers, Quantized, quantize
from laconic.formats.schemes import PRESETS, Scheme
from laconic.formats.storage import scheme_of_shapes, stored_bytes, stored_shapes

SHAPE = (48, 256)
KEPT = [
    replace(PRESETS[name], outlier_columns=columns, rank=rank)
    for name in ("W8A8", "W4A16_ASYM", "W6A6", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
    for columns, rank in ((3, 0), (0, 5), (3, 5))
]
every_scheme = pytest.mark.parametrize("kept", KEPT, ids=lambda s: f"{s.name}-{s.outlier_columns}-{s.rank}")


def made(kept: Scheme, dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """A weight with so many outlier columns, and a product of such a rank."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    w = draw(*SHAPE)
    q = quantize(kept.weights, w, kept.weights.fit(w, dtype))
    if k := kept.outlier_columns:
        q = replace(
            q, outliers=Outliers(torch.tensor([7, 31, 200][:k], dtype=torch.int32), draw(SHAPE[0], k).to(dtype))
        )
    if r := kept.rank:
        q = replace(q, low_rank=LowRank(draw(SHAPE[0], r).to(dtype), draw(r, SHAPE[1]).to(dtype)))
    return q


@every_scheme
def test_the_whole_weight_is_codes_and_columns_and_product(kept: Scheme) -> None:
    q = made(kept)
    expected = replace(q, outliers=None, low_rank=None).decode().double().numpy()
    if q.outliers:
        for place, column in enumerate(q.outliers.indices.tolist()):
            expected[:, column] = q.outliers.weight[:, place].double()
    if q.low_rank:
        expected += np.matmul(q.low_rank.left.double().numpy(), q.low_rank.right.double().numpy())
    np.testing.assert_allclose(q.decode().double().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(q.decode(torch.bfloat16), q.decode().bfloat16())


@every_scheme
def test_rows_are_cut_with_what_is_beside_them(kept: Scheme) -> None:
    q, stop = made(kept), SHAPE[0]
    start = 0 if kept.weights.tiling.strategy == "block" else 16
    part = q.rows(start, stop)
    # A product of fewer rows adds up in another order.
    torch.testing.assert_close(part.decode(), q.decode()[start:stop], rtol=1e-5, atol=1e-5)


@every_scheme
def test_columns_are_cut_with_what_is_beside_them(kept: Scheme) -> None:
    q = made(kept)
    for start, stop in ((0, 128), (128, 256)):
        part = q.columns(start, stop)
        torch.testing.assert_close(part.decode(), q.decode()[:, start:stop], rtol=1e-5, atol=1e-5)


@every_scheme
def test_what_was_stored_is_read_back_bit_for_bit(kept: Scheme) -> None:
    q = made(kept)
    stored = q.to_tensors()
    assert torch.equal(Quantized.from_tensors(kept.weights, stored, SHAPE).decode(), q.decode())
    assert stored_bytes(kept, SHAPE, torch.bfloat16) == sum(t.nbytes for t in stored.values())
    foretold = stored_shapes(kept, SHAPE, torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in foretold.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}


@every_scheme
def test_a_file_tells_how_many_columns_and_what_rank(kept: Scheme) -> None:
    uncounted = replace(kept, outlier_columns=None, rank=0)
    assert scheme_of_shapes(uncounted, {n: tuple(t.shape) for n, t in made(kept).to_tensors().items()}) == kept


def test_only_what_engines_have_no_name_for_is_native_and_only_int8_is_real() -> None:
    w8a8, w4a16 = PRESETS["W8A8"], PRESETS["W4A16"]
    assert not w8a8.native
    for extra in ({"outlier_columns": 2}, {"outlier_columns": None}):
        assert replace(w8a8, **extra).native
        assert not replace(w8a8, **extra).simulated
        assert replace(w4a16, **extra).simulated
    assert replace(w8a8, rank=2).simulated
    assert PRESETS["W6A6"].native
