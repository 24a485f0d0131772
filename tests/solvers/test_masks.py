"""Masks: so many weights as asked go, they are the least, and they go in the structure that was named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laconic.solvers.masks import (
    ComparisonGroup,
    MaskStructure,
    StackedLinear,
    keep_mask,
    keep_mask_of_stack,
    parse_mask_structure,
)

structures = st.sampled_from(["unstructured", "2:4", "4:8", "1:4", "3:5", "7:32", "2x4", "4x1", "1x8", "16x16"])


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, MaskStructure, float, ComparisonGroup]:
    """Scores, many of them equal perhaps, in a shape that the structure divides."""
    structure = parse_mask_structure(draw(structures))
    rows = structure.height * draw(st.integers(1, 5))
    columns = structure.width * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scores = torch.rand(rows, columns, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 3).round()
    sparsity = structure.sparsity if structure.sparsity is not None else draw(st.floats(0, 0.99))
    return scores, structure, sparsity, draw(st.sampled_from(["row", "matrix"]))


def lines_of(x: Tensor, structure: MaskStructure, among: ComparisonGroup) -> Tensor:
    """What is compared with one another, a line each: elements, or tiles."""
    if structure.group:
        return x.reshape(-1, structure.group[1])
    if structure.tile:
        height, width = structure.tile
        x = x.float().view(len(x) // height, height, -1, width).sum((1, 3))
    return x if among == "row" else x.reshape(1, -1)


@given(scored())
def test_the_least_go_and_as_many_as_asked(case: tuple[Tensor, MaskStructure, float, ComparisonGroup]) -> None:
    scores, structure, sparsity, among = case
    keep = keep_mask(scores, sparsity, structure, among)
    assert keep.shape == scores.shape
    kept, worth = lines_of(keep, structure, among) > 0, lines_of(scores, structure, among)
    gone = round(sparsity * kept.shape[1])
    assert ((~kept).sum(1) == gone).all()
    if 0 < gone < kept.shape[1]:
        least_kept = worth.masked_fill(~kept, float("inf")).amin(1)
        most_gone = worth.masked_fill(kept, -float("inf")).amax(1)
        assert (most_gone <= least_kept).all()
    if structure.tile:
        # A tile stays or goes as one.
        area = structure.height * structure.width
        assert set(lines_of(keep, structure, among).unique().tolist()) <= {0.0, float(area)}


@given(scored())
def test_stacked_linears_are_masked_as_each_alone(case: tuple[Tensor, MaskStructure, float, ComparisonGroup]) -> None:
    scores, structure, sparsity, among = case
    other = scores.flip(0) * 2
    parts = [
        StackedLinear(slice(0, len(scores)), sparsity),
        StackedLinear(slice(len(scores), 2 * len(scores)), sparsity / 2),
    ]
    together = keep_mask_of_stack(torch.cat([scores, other]), parts, structure, among)
    alone = [keep_mask(s, part.sparsity, structure, among) for s, part in zip((scores, other), parts, strict=True)]
    assert torch.equal(together, torch.cat(alone))


@given(st.integers(0, 99), st.sampled_from(["row", "matrix"]), st.booleans())
def test_what_is_spared_stays_and_does_not_count(seed: int, among: Any, rows: bool) -> None:
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros((8, 1) if rows else (1, 12), dtype=torch.bool)
    chosen.view(-1)[2:6] = True
    keep = keep_mask_of_stack(scores, [StackedLinear(slice(0, 8), 0.5, chosen)], MaskStructure(), among)
    assert keep[chosen.expand(8, 12)].all()
    rest = ~chosen.expand(8, 12)
    assert (~keep)[rest].sum() == rest.sum() / 2


def test_of_equals_the_first_go() -> None:
    assert keep_mask(torch.ones(2, 40), 0.25, MaskStructure()).tolist() == [[False] * 10 + [True] * 30] * 2
    assert keep_mask(torch.ones(1, 8), 0.5, parse_mask_structure("2:4")).tolist() == [[False, False, True, True] * 2]


@pytest.mark.parametrize("text", ["2:2", "0:4", "5:4", "4", "2:4:8", "x16", "1x1", "0x4", "dense", ""])
def test_a_structure_that_there_is_not(text: str) -> None:
    with pytest.raises(ValueError, match="mask_structure"):
        parse_mask_structure(text)


def test_a_matrix_that_the_structure_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not consist of 16 by 16"):
        keep_mask(torch.rand(16, 24), 0.5, parse_mask_structure("16x16"))
