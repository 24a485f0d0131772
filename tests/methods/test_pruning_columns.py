"""Pruning in the column loop, held to the papers' own loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.solvers.masks import StackedLinear, keep_mask, parse_mask_structure, single_linear
from laconic.solvers.obs import factor_hessian
from laconic.solvers.prune import least_squares, prune_with_hessian
from linears import correlated, output_error, weight

W, X = weight(32, 256), correlated(2048, 256)
H = X.T @ X / len(X)
NEAR = {"rtol": 1e-3, "atol": 1e-4}


def sparsegpt(W: Tensor, H: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None, block: int = 128) -> Tensor:
    """Algorithm 1 of the paper: the upper Cholesky factor of the inverse Hessian, weights updated as columns go. Of
    N:M, n of m *go*. In float64."""
    W, H = W.double().clone(), H.double().clone()
    n = len(H)
    H += 0.01 * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for start in range(0, n, block):
        stop = min(start + block, n)
        gone = torch.zeros(len(W), n, dtype=torch.bool)
        if n_of_m is None:
            saliency = (W / U.diagonal())[:, start:stop] ** 2
            least = saliency.flatten().argsort()[: round(sparsity * saliency.numel())]
            gone[:, start:stop] = torch.zeros(saliency.numel()).index_fill(0, least, 1).view_as(saliency).bool()
        for j in range(start, stop):
            if n_of_m and j % n_of_m[1] == 0:
                few = slice(j, j + n_of_m[1])
                least = ((W[:, few] / U.diagonal()[few]) ** 2).argsort(1)[:, : n_of_m[0]]
                gone[:, few] = torch.zeros(len(W), n_of_m[1]).scatter(1, least, 1).bool()
            error = W[:, j] * gone[:, j] / U[j, j]
            W[:, j:] -= error[:, None] * U[j, j:]
            W[:, j] = W[:, j] * ~gone[:, j]
    return W


def ours(W: Tensor, H: Tensor, sparsity: float, structure: str, parts: list[StackedLinear] | None = None) -> Tensor:
    order = torch.arange(len(H))
    factor = factor_hessian(H, 0.01)
    return prune_with_hessian(
        W, factor, order, W == 0, parts or single_linear(W, sparsity), parse_mask_structure(structure)
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_unstructured_is_the_papers_loop(sparsity: float) -> None:
    torch.testing.assert_close(ours(W, H, sparsity, "unstructured").double(), sparsegpt(W, H, sparsity), **NEAR)


@pytest.mark.parametrize(("structure", "gone"), [("2:4", (2, 4)), ("4:8", (4, 8)), ("1:4", (3, 4))])
def test_groups_are_the_papers_loop(structure: str, gone: tuple[int, int]) -> None:
    torch.testing.assert_close(ours(W, H, 0.0, structure).double(), sparsegpt(W, H, 0.0, gone), **NEAR)


def test_each_of_stacked_linears_is_pruned_as_alone() -> None:
    other = weight(48, 256).flip(1) * 3
    parts = [StackedLinear(slice(0, 32), 0.5), StackedLinear(slice(32, 80), 0.6)]
    together = ours(torch.cat([W, other]), H, 0.5, "unstructured", parts)
    torch.testing.assert_close(together[:32], ours(W, H, 0.5, "unstructured"))
    torch.testing.assert_close(together[32:], ours(other, H, 0.6, "unstructured"))


def test_tiles_go_whole_and_cost_more() -> None:
    made = ours(W, H, 0.5, "8x8")
    tiles = (made != 0).view(4, 8, 32, 8).sum((1, 3))
    assert set(tiles.unique().tolist()) <= {0, 64}
    assert int((tiles == 0).sum()) == 64
    assert output_error(W, made, X) > output_error(W, ours(W, H, 0.5, "unstructured"), X)


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4x4"])
def test_the_order_of_columns_changes_which_go_but_not_how_many(structure: str) -> None:
    shape = parse_mask_structure(structure)
    order = torch.randperm(256 // shape.width, generator=torch.Generator().manual_seed(0))
    order = (order[:, None] * shape.width + torch.arange(shape.width)).flatten()
    factor = factor_hessian(H, 0.01, order)
    made = prune_with_hessian(W, factor, order, W == 0, single_linear(W, 0.5), shape)
    assert float((made == 0).float().mean()) == 0.5
    if shape.group:
        assert ((made != 0).view(32, -1, 4).sum(-1) == 2).all()
    least = output_error(W, W * keep_mask(W.square() * H.diagonal(), 0.5, shape), X)
    assert output_error(W, made, X) < least


def test_zeros_that_were_there_stay_and_are_counted() -> None:
    thin = W.clone()
    thin[:, ::4] = 0
    made = ours(thin, H, 0.5, "unstructured")
    assert (made[:, ::4] == 0).all()
    assert float((made == 0).float().mean()) == 0.5
    # As many as asked, though more are there: none is filled in.
    assert torch.equal(ours(thin, H, 0.1, "unstructured") == 0, thin == 0)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_answer_to_a_mask_is_the_least_squares_solution(uneven: bool) -> None:
    keep = keep_mask(W.square() * H.diagonal(), 0.6, parse_mask_structure("unstructured"))
    if uneven:
        keep[3, :200], keep[5] = False, False
    made = least_squares(W, keep, H)
    assert (made[~keep] == 0).all()
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    for row, kept, found in zip(W.double(), keep, made, strict=True):
        expected = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ row)
        torch.testing.assert_close(found[kept].double(), expected, rtol=1e-3, atol=1e-4)


def test_no_other_weights_on_the_mask_come_closer() -> None:
    made = ours(W, H, 0.5, "unstructured")
    better = least_squares(W, made != 0, H)
    assert output_error(W, better, X) < output_error(W, made, X) < output_error(W, W * (made != 0), X)
