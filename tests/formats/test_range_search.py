"""The search for a range: as good as trying every candidate in float64, and never worse than min-max."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import DTYPES, FORMATS, ROW, TILINGS, matrices, name
from torch import Tensor

from laconic.formats import Format, Params, quantize
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling
from laconic.solvers.search import search_range

ROUNDING = 1 + 1e-5


def importances(n: int, seed: int = 0) -> Tensor:
    """Some columns matter much more than others."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 4


def tile_errors(fmt: Format, w: Tensor, params: Params, importance: Tensor | None) -> Tensor:
    """The weighted squared error of each tile, in float64."""
    h = torch.ones(w.shape[1]) if importance is None else importance
    return fmt.tiling.split((quantize(fmt, w, params).decode().double() - w) ** 2 * h).sum(-1)


@pytest.mark.parametrize("tiling", TILINGS, ids=name)
@pytest.mark.parametrize(
    "kind", [IntAffine(2, False, ROW), IntAffine(4, True, ROW), Fp8(ROW), MxFp4(ROW), NvFp4(ROW)], ids=name
)
@given(data=st.data(), dtype=DTYPES)
def test_no_tile_is_worse_off_than_with_its_whole_range(
    kind: Format, tiling: Tiling, data: st.DataObject, dtype: torch.dtype
) -> None:
    fmt = replace(kind, tiling=tiling)
    w = data.draw(matrices(multiple_of=tiling.group_size or 1))
    importance = data.draw(st.none() | st.integers(0, 99).map(lambda seed: importances(w.shape[1], seed)))
    found = search_range(fmt, w, importance, dtype=dtype)
    assert all(found[n].shape == p.shape and found[n].dtype == p.dtype for n, p in fmt.fit(w, dtype).items())
    ours, min_max = (tile_errors(fmt, w, p, importance) for p in (found, fmt.fit(w, dtype)))
    assert bool((ours <= min_max * ROUNDING).all())


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.symmetric], ids=name)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_symmetric_range_is_nearly_the_best_of_many(fmt: Format, weighted: bool, dtype: torch.dtype) -> None:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) ** 3
    importance, shared = importances(32) if weighted else None, fmt.fit_shared(w)
    # Where the steps at the top are coarse, the largest value may do better on 4 than on 6.
    widest = 1.5 if isinstance(fmt, NvFp4) else 1
    candidates = [
        {**fmt.from_range(w.amin(-1)[:, None] * p, w.amax(-1)[:, None] * p, dtype, shared), **shared}
        for p in (1.0, *torch.linspace(widest, 0.4, 25).tolist())
    ]
    least = torch.stack([tile_errors(fmt, w, c, importance) for c in candidates]).amin(0)
    found = tile_errors(fmt, w, search_range(fmt, w, importance, dtype=dtype), importance)
    assert float(found.sum()) < 1.03 * float(least.sum())


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_an_asymmetric_range_is_close_to_the_best_pair_of_ends(num_bits: int) -> None:
    fmt = IntAffine(num_bits, False, ROW)
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) ** 3 + 0.5
    lo, hi = w.amin(-1)[:, None], w.amax(-1)[:, None]
    shares = torch.linspace(1, 0.4, 25).tolist()
    pairs = [fmt.from_range(lo * a, hi * b, torch.float32) for a, b in product(shares, shares)]
    tied = [fmt.from_range(lo * p, hi * p, torch.float32) for p in shares]
    of = lambda params: tile_errors(fmt, w, params, None)  # noqa: E731
    best_pair, best_tied = (torch.stack([of(p) for p in several]).amin(0) for several in (pairs, tied))
    found = of(search_range(fmt, w))
    assert bool((found <= best_tied * ROUNDING).all())
    assert float(found.sum()) < 1.2 * float(best_pair.sum())


def test_an_outlier_is_clipped_only_where_its_column_does_not_matter() -> None:
    fmt = IntAffine(3, True, ROW)
    w = torch.linspace(-1, 1, 64).repeat(1, 1)
    w[0, 5] = 2.5
    matters = torch.ones(64)
    matters[5] = 1e4
    wide, narrow = (search_range(fmt, w, h)["scale"].abs() for h in (matters, matters.reciprocal()))
    assert narrow < 0.6 * wide


def test_tiles_searched_in_chunks_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = IntAffine(4, False, TILINGS[3])
    w, importance = torch.randn(33, 40, generator=torch.Generator().manual_seed(0)), importances(40)
    whole = search_range(fmt, w, importance)
    monkeypatch.setattr("laconic.formats.chunks._CPU_ELEMENTS", 28)
    chunked = search_range(fmt, w, importance)
    assert all(torch.equal(whole[n], chunked[n]) for n in whole)
