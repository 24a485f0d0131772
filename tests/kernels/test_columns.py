"""The column loop against GPTQ's own loop in float64, and the Triton kernel against the loop in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from documented import run_block
from laconic.formats import Params
from laconic.formats.fp4 import Fp4, MxFp4, NvFp4, decode_e2m1
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling
from laconic.kernels.columns import affine_columns_torch
from laconic.solvers.grid import GridRounder, OnlineGridRounder
from laconic.solvers.obs import factor_hessian, run_column_loop
from laconic.solvers.search import search_range

ROWS, COLUMNS, GROUP = 128, 192, 48
DAMPENING = 0.01

# The paper's loop -----------------------------------------------------------------------------------------------------


reference = run_block("docs/methods/gptq.md", "## The algorithm")


def algorithm_1(
    W: Tensor, H: Tensor, fmt: IntAffine, params_at: Callable[[int, Tensor], Params]
) -> tuple[Tensor, Tensor]:
    """GPTQ as its page shows it, onto integers.

    params_at: the parameters (each (rows,)) of a column, given the weights as they have become by then.
    Returns: codes and values, (rows, columns).
    """

    def points_at(j: int, now: Tensor) -> Tensor:
        params = params_at(j, now)
        scale = params["scale"]
        return reference["integer_points"](scale, params.get("zero_point", torch.zeros_like(scale)), fmt.num_bits)

    index, Q = reference["gptq"](W, H, points_at, DAMPENING)
    return index + fmt.qmin, Q


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(ROWS, COLUMNS, generator=generator)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    x = torch.randn(2048, COLUMNS, generator=generator) @ mixed * torch.linspace(-2, 2, COLUMNS).exp()
    return W, x.T @ x / len(x)


def agree(W: Tensor, H: Tensor, ours: tuple[Tensor, Tensor], papers: tuple[Tensor, Tensor]) -> None:
    """Nearly all codes are the same; where a tie fell the other way, the objective is none the worse."""

    def objective(Q: Tensor) -> float:
        E = W.double() - Q.double()
        return float(((E @ H.double()) * E).sum())

    assert (ours[0] == papers[0]).double().mean() >= 0.999
    assert objective(ours[1]) == pytest.approx(objective(papers[1]), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", [True, False])
def test_column_loop_on_static_groups_is_the_papers_loop(symmetric: bool, actorder: bool) -> None:
    W, H = problem()
    fmt = IntAffine(4, symmetric, Tiling("group", GROUP))
    params = search_range(fmt, W, H.diagonal())
    order = H.diagonal().argsort(descending=True) if actorder else torch.arange(COLUMNS)

    swept = run_column_loop(
        W[:, order], factor_hessian(H[order][:, order], DAMPENING).A, GridRounder(fmt, params, W.shape, order)
    )
    codes = swept[:, order.argsort()]

    expected = algorithm_1(
        W[:, order], H[order][:, order], fmt, lambda j, _: {n: p[:, order[j] // GROUP] for n, p in params.items()}
    )
    back = order.argsort()
    agree(W, H, (codes, fmt.decode(codes, params)), (expected[0][:, back], expected[1][:, back]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_column_loop_on_online_groups_is_the_papers_loop(symmetric: bool, observer: str) -> None:
    W, H = problem()
    # A wide symmetric grid over the weights as they are puts the largest, if negative, at -7.5 scales: always a tie.
    fmt = IntAffine(4, symmetric, Tiling("group", GROUP), narrow=symmetric)
    importance = H.diagonal() if observer == "mse" else None

    rounder = OnlineGridRounder(fmt, W, torch.float32, importance)
    codes = run_column_loop(W, factor_hessian(H, DAMPENING).A, rounder)

    found: dict[str, Tensor] = {}

    def params_at(j: int, now: Tensor) -> Params:
        if j % GROUP == 0:
            group = now[:, j : j + GROUP].float()
            fitted = fmt.fit(group) if importance is None else search_range(fmt, group, importance[j : j + GROUP])
            found.update({name: p[:, 0] for name, p in fitted.items()})
        return found

    agree(W, H, (codes, fmt.decode(codes, rounder.params)), algorithm_1(W, H, fmt, params_at))


@pytest.mark.parametrize("fmt", [NvFp4(), MxFp4()], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "online"])
def test_column_loop_onto_fp4_is_the_papers_loop_onto_its_points(fmt: Fp4, static: bool) -> None:
    W, H = problem()
    A = factor_hessian(H, DAMPENING).A
    if static:
        params = search_range(fmt, W, H.diagonal())
        codes = run_column_loop(W, A, GridRounder(fmt, params, W.shape, torch.arange(COLUMNS)))
    else:
        rounder = OnlineGridRounder(fmt, W, torch.float32, H.diagonal())
        codes, params = run_column_loop(W, A, rounder), rounder.params
    points = decode_e2m1(torch.arange(16, dtype=torch.uint8)).double()
    grid = fmt.unit(params).double().repeat_interleave(fmt.tiling.group_size, 1)[..., None] * points

    Q = reference["gptq"](W, H, lambda j, _: grid[:, j], DAMPENING)[1]
    agree(
        W,
        H,
        (fmt.decode(codes, params).double().round(decimals=5), fmt.decode(codes, params)),
        (Q.round(decimals=5), Q),
    )


# The kernel -----------------------------------------------------------------------------------------------------------

Columns = Callable[..., tuple[Tensor, Tensor]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernel(on_triton: Callable[..., Any]) -> Columns:
    """The Triton kernel."""
    from laconic.kernels.columns_triton import affine_columns_triton

    return partial(on_triton, affine_columns_triton)


Unit = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, tuple[int, int]]


def dyadic_unit(n: int, rows: int, bits: int, symmetric: bool, expanded: bool, seed: int) -> Unit:
    """A unit in which every float32 sum is exact in any order, and many a value is exactly half way.

    expanded: one scale for all columns (stride 0), and weights whose columns are the contiguous dimension.
    """
    generator = torch.Generator().manual_seed(seed)

    def whole(lo: int, hi: int, *shape: int) -> Tensor:
        return torch.randint(lo, hi + 1, shape, generator=generator).float().to(DEVICE)

    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    W, X = whole(-64, 64, rows, n).T / 16, whole(-64, 64, rows, n).T / 16
    A = whole(-2, 2, n, n).tril(-1) / 4
    scale = 2.0 ** -whole(0, 2, rows, 1).T.expand(n, rows)
    zero_point = None if symmetric else whole(qmin, qmax, rows, 1).T.expand(n, rows)
    if not expanded:
        W, X, scale = W.contiguous(), X.contiguous(), scale.contiguous()
        zero_point = None if zero_point is None else zero_point.contiguous()
    return W, X, A, scale, zero_point, (qmin, qmax)


def assert_identical(kernel: Columns, unit: Unit) -> None:
    for ours, expected in zip(kernel(*unit), affine_columns_torch(*unit), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 16),
    rows=st.integers(1, 40),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    expanded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernel_is_exact_where_arithmetic_is(
    kernel: Columns, n: int, rows: int, bits: int, symmetric: bool, expanded: bool, seed: int
) -> None:
    assert_identical(kernel, dyadic_unit(n, rows, bits, symmetric, expanded, seed))


@pytest.mark.parametrize("n", [43, 96, 200])
def test_kernel_takes_units_of_any_width(kernel: Columns, n: int) -> None:
    assert_identical(kernel, dyadic_unit(n, rows=5, bits=4, symmetric=False, expanded=True, seed=0))


def test_kernel_divides_truly_and_rounds_half_to_even(kernel: Columns) -> None:
    scale = torch.linspace(0.01, 1.0, 512, device=DEVICE)[None]
    X = (torch.arange(512, device=DEVICE) % 15 - 7.5) * scale
    assert ((X / scale).round() != (X * (1 / scale)).round()).any(), "a reciprocal would do: the test shows nothing"
    unit = X, X, torch.zeros(1, 1, device=DEVICE), scale, None, (-8, 7)
    assert torch.equal(kernel(*unit)[0], affine_columns_torch(*unit)[0])


def test_kernel_agrees_on_real_numbers(kernel: Columns) -> None:
    n, rows = 64, 48
    generator = torch.Generator().manual_seed(0)
    W, noise = torch.randn(2, n, rows, generator=generator).to(DEVICE)
    A = torch.randn(n, n, generator=generator).tril(-1).to(DEVICE) / n**0.5
    scale = W.abs().amax(0, keepdim=True).expand(n, rows) / 7.5

    codes, E = kernel(W, W + 0.1 * noise, A, scale, None, (-8, 7))
    expected, expected_E = affine_columns_torch(W, W + 0.1 * noise, A, scale, None, (-8, 7))

    same = codes == expected
    assert same.float().mean() >= 0.999
    torch.testing.assert_close(E[same], expected_E[same], rtol=0, atol=1e-5)
