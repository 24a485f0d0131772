"""Refinement never raises the loss, and ends where no single change lowers it; checked by brute force in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic.formats import Quantized
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import scheme
from laconic.methods.gptq import Gptq
from laconic.solvers.grid import round_with_hessian
from laconic.solvers.refine import fit_scales, refine, round_columns_again
from laconic.solvers.search import search_range
from linears import correlated, made_of, output_error, weight

SCHEMES: list[dict[str, Any]] = [
    {"name": "W4A16", "group_size": 32},
    {"name": "W2A16", "symmetric": False, "group_size": 32},
    {"name": "W3A16", "group_size": -1},
    {"name": "FP8"},
    {"name": "NVFP4A16"},
]


def hessian(n: int = 128) -> Tensor:
    x = correlated(n=n)
    H = x.T @ x / len(x)
    return H + 0.01 * H.diagonal().mean() * torch.eye(n)


def rounded(W: Tensor, H: Tensor, **keys: Any) -> Quantized:
    fmt = as_scalar(scheme(**keys).weights)
    params = search_range(fmt, W, H.diagonal(), dtype=torch.bfloat16)
    return Quantized.scalar(fmt, round_with_hessian(fmt, W, H, params), params)


def loss(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    E = W.double() - Q.double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("keys", SCHEMES, ids=lambda k: k["name"])
def test_the_loss_of_no_row_rises_and_that_of_all_falls(keys: dict[str, Any]) -> None:
    W, H = weight(), hessian()
    losses, dtype = [], rounded(W, H, **keys).params["scale"].dtype
    for passes in (None, 0, 1, 3):
        q = rounded(W, H, **keys)
        q = q if passes is None else refine(q, W, H, passes, block_size=48)
        losses.append(loss(W, q.decode(), H))
        assert q.params["scale"].dtype == dtype
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < 0.97 * losses[0].sum()


def test_a_pass_rounds_each_column_to_the_best_of_all_codes() -> None:
    W, H = weight(8, 32), hessian(32)
    q = rounded(W, H, name="W3A16", symmetric=False, group_size=16)
    fmt = as_scalar(q.format)
    assert fmt.integer_range is not None
    lowest, highest = fmt.integer_range
    best = q.codes.clone()
    for j in range(32):
        tries = []
        for code in range(lowest, highest + 1):
            attempt = best.clone()
            attempt[:, j] = code
            tries.append(loss(W, fmt.decode(attempt, q.params), H))
        best[:, j] = torch.stack(tries).argmin(0) + lowest
    assert torch.equal(round_columns_again(fmt, q.codes, q.params, W, H, block_size=8), best)


def test_scales_of_rows_are_those_of_least_squares() -> None:
    W, H = weight(8, 32), hessian(32)
    q = rounded(W, H, name="W3A16", group_size=-1)
    values = q.codes.double()
    best = ((values @ H.double()) * W.double()).sum(1) / ((values @ H.double()) * values).sum(1)
    params = {"scale": q.params["scale"].float()}
    assert torch.allclose(
        fit_scales(as_scalar(q.format), q.codes, params, W, H)["scale"][:, 0].double(), best, rtol=1e-4
    )


@pytest.mark.parametrize("more", [{}, {"symmetric": False}, {"sparsity": 0.5}], ids=str)
def test_gptqs_error_falls_and_zeros_stay(more: dict[str, Any]) -> None:
    x, W = correlated(), weight()
    W[:, ::5] = 0
    keys = {"scheme": "W3A16", "group_size": 32} | more
    plain, refined = (made_of(Gptq.model_validate(keys | {"refine": n}), W, x) for n in (0, 2))
    assert output_error(W, refined, x) < output_error(W, plain, x)
    zeros = plain == 0 if "sparsity" in more else W == 0
    assert (refined[zeros] == 0).all()
