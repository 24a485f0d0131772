"""Tilings: every element in exactly one tile, the right one, and back where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import TILINGS, matrices, name
from torch import Tensor

from laconic.formats import quantize
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling

every_tiling = pytest.mark.parametrize("tiling", TILINGS, ids=name)


def fitting(tiling: Tiling) -> st.SearchStrategy[Tensor]:
    return matrices(multiple_of=tiling.group_size or 1)


def owner(tiling: Tiling, row: int, column: int) -> tuple[int, ...]:
    """Which parameter an element uses, as one would say it."""
    match tiling.strategy:
        case "tensor":
            return (0,)
        case "channel" | "token":
            return (row, 0)
        case "group":
            return (row, column // tiling.group_size)
        case "block":
            height, width = tiling.block_structure
            return (row // height, column // width)


@every_tiling
@given(data=st.data())
def test_join_undoes_split(tiling: Tiling, data: st.DataObject) -> None:
    w = data.draw(fitting(tiling))
    assert torch.equal(tiling.join(tiling.split(w), w.shape), w)


@every_tiling
@given(data=st.data())
def test_a_tile_holds_the_elements_that_share_its_parameter(tiling: Tiling, data: st.DataObject) -> None:
    shape = data.draw(fitting(tiling)).shape
    numbered = torch.arange(1, 1 + shape.numel()).view(shape)
    tiles = tiling.split(numbered)
    assert tiles.shape[:-1] == tiling.param_shape(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            assert int(numbered[row, column]) in tiles[owner(tiling, row, column)].tolist()
    assert int((tiles != 0).sum()) == shape.numel()


@every_tiling
@pytest.mark.parametrize("symmetric", [True, False])
@given(data=st.data())
def test_rows_of_a_quantized_matrix_stand_on_their_own(tiling: Tiling, symmetric: bool, data: st.DataObject) -> None:
    w = data.draw(fitting(tiling))
    height = tiling.block_structure[0] if tiling.block_structure else 1
    edges = [*range(0, w.shape[0], height), w.shape[0]]
    start, stop = sorted(data.draw(st.lists(st.sampled_from(edges), min_size=2, max_size=2, unique=True)))
    fmt = IntAffine(4, symmetric, tiling)
    whole = quantize(fmt, w, fmt.fit(w))
    part = whole.rows(start, stop)
    assert torch.equal(part.decode(), whole.decode()[start:stop])
    assert all(p.shape == tiling.param_shape((stop - start, w.shape[1])) for p in part.params.values())


@every_tiling
@pytest.mark.parametrize("symmetric", [True, False])
@given(data=st.data())
def test_columns_of_a_quantized_matrix_stand_on_their_own(tiling: Tiling, symmetric: bool, data: st.DataObject) -> None:
    w = data.draw(fitting(tiling))
    fmt = IntAffine(4, symmetric, tiling)
    edges = [*range(0, w.shape[1], fmt.column_unit or 1), w.shape[1]]
    start, stop = sorted(data.draw(st.lists(st.sampled_from(edges), min_size=2, max_size=2, unique=True)))
    whole = quantize(fmt, w, fmt.fit(w))
    part = whole.columns(start, stop)
    assert torch.equal(part.decode(), whole.decode()[:, start:stop])
    assert all(p.shape == tiling.param_shape((w.shape[0], stop - start)) for p in part.params.values())


@pytest.mark.parametrize(
    ("tiling", "start"), [(Tiling("group", 4), 2), (Tiling("block", block_structure=(3, 4)), 6)], ids=str
)
def test_columns_that_cut_a_tile_are_refused(tiling: Tiling, start: int) -> None:
    w = torch.ones(7, 8)
    fmt = IntAffine(4, True, tiling)
    with pytest.raises(ValueError, match=f"columns {start}:8 cut a {tiling.strategy} of 4 columns"):
        quantize(fmt, w, fmt.fit(w)).columns(start, 8)


@pytest.mark.parametrize(("start", "stop"), [(1, 6), (0, 4), (2, 5)])
def test_rows_that_cut_a_block_are_refused(start: int, stop: int) -> None:
    fmt = IntAffine(4, True, Tiling("block", block_structure=(3, 5)))
    w = torch.ones(7, 5)
    with pytest.raises(ValueError, match=f"rows {start}:{stop} cut a block of 3 rows"):
        quantize(fmt, w, fmt.fit(w)).rows(start, stop)


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "diagonal"},
        {"strategy": "group"},
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": -1},
        {"strategy": "channel", "group_size": 4},
        {"strategy": "block"},
        {"strategy": "tensor", "block_structure": (2, 2)},
    ],
    ids=str,
)
def test_a_tiling_that_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"strategy|group_size"):
        Tiling(**given)


def test_a_group_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="group_size 4 does not divide 6 columns"):
        Tiling("group", 4).split(torch.ones(2, 6))
