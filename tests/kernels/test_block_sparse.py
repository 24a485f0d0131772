"""Block-sparse products against the dense one in float64, in torch and by the Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laconic.kernels.block_sparse import block_sparse_linear
from laconic.kernels.block_sparse_weight import BlockSparseWeight, to_block_sparse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Product = Callable[..., Tensor]


def weight(rows: int, columns: int, block: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """(rows blocks, columns blocks) of whole numbers, so that every sum is exact in any order."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randint(-4, 5, (rows * block[0], columns * block[1]), generator=g).float()
    kept = (torch.rand(rows, columns, generator=g) < density).float()
    return W * kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def tokens(n: int, width: int, seed: int = 1) -> Tensor:
    return torch.randint(-4, 5, (n, width), generator=torch.Generator().manual_seed(seed)).float()


@given(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from([(1, 1), (2, 4), (16, 8)]), st.floats(0, 1), st.integers(1, 9)
)
def test_the_product_is_the_dense_one(rows: int, columns: int, block: tuple[int, int], density: float, n: int) -> None:
    W = weight(rows, columns, block, density)
    held, x = to_block_sparse(W, block), tokens(n, W.shape[1])
    assert torch.equal(held.dense(), W)
    y = block_sparse_linear(x, held)
    assert y.dtype == x.dtype
    assert torch.equal(y.double(), x.double() @ W.double().T)


def test_what_is_kept_is_what_is_not_zero() -> None:
    W = torch.zeros(8, 8)
    W[5, 2] = 1
    held = to_block_sparse(W, (4, 4))
    assert (held.density, held.col_indices.tolist(), held.crow_indices.tolist()) == (0.25, [0], [0, 0, 1])
    assert held.nbytes == 16 * 4 + 4 + 3 * 4


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 4 x 3 do not divide a weight of 8 x 8"):
        to_block_sparse(torch.zeros(8, 8), (4, 3))


@pytest.fixture(scope="module")
def kernel(on_triton: Callable[..., Any]) -> Product:
    """The Triton kernel."""
    from laconic.kernels.block_sparse_triton import block_sparse_linear_triton

    return partial(on_triton, block_sparse_linear_triton)


@pytest.mark.parametrize(("n", "parts"), [(1, None), (7, 1), (33, 3), (150, None)])
@pytest.mark.parametrize(("block", "density"), [((16, 16), 0.5), ((32, 16), 0.3), ((16, 64), 0.0), ((16, 32), 1.0)])
def test_kernel_is_the_dense_product(
    kernel: Product, block: tuple[int, int], density: float, n: int, parts: int | None
) -> None:
    W = weight(3, 5, block, density)
    held, x = _on_device(to_block_sparse(W, block)), tokens(n, W.shape[1])
    y = kernel(x.to(DEVICE), held, parts=parts)
    assert torch.equal(y.double().cpu(), x.double() @ W.double().T)


def test_kernel_in_16_bit(kernel: Product) -> None:
    W = weight(2, 4, (32, 32), 0.5)
    x = tokens(5, W.shape[1])
    y = kernel(x.to(DEVICE, torch.float16), _on_device(to_block_sparse(W.half(), (32, 32))))
    assert y.dtype == torch.float16
    assert torch.equal(y.double().cpu(), x.double() @ W.double().T)


def _on_device(W: BlockSparseWeight) -> BlockSparseWeight:
    return BlockSparseWeight(W.values.to(DEVICE), W.col_indices.to(DEVICE), W.crow_indices.to(DEVICE), W.shape)
