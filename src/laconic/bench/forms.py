"""Forms of a linear's weight and its product: dense, sparse or smaller, in 16 bit, int8 or fp8."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.bench.options import KINDS
from laconic.bench.semi_structured import cuda_capability, cusparselt, cutlass, pad_rows
from laconic.bench.zeros import to_2_of_4, to_unstructured, to_zero_blocks
from laconic.kernels.block_sparse import block_sparse_linear
from laconic.kernels.block_sparse_weight import to_block_sparse

DENSE = "dense"
# torch's int8 and fp8 products need more than 16 rows.
_MIN_ROWS = 32


@dataclass(frozen=True)
class KernelWeight:
    """A weight in the layout of a kernel.

    Attributes:
        multiply: Maps x (tokens, in) to (tokens, out).
        nbytes: Bytes of the weight in this layout.
        multiplied: Number of weights that are multiplied.
        dense: The dense weight (out, in) that it represents.
    """

    multiply: Callable[[Tensor], Tensor]
    nbytes: int
    multiplied: int
    dense: Tensor


@dataclass(frozen=True)
class Form:
    """A form of a weight.

    Attributes:
        kind: `dense`, `unstructured`, `2:4`, `block N` or `structured`.
        kernel: Library of the kernel.
        dtype: Dtype of the operands.
        sparsity: Share of pruned weights.
        pack: Converts a dense weight (out, in) of floats; raises torch's error if that is not possible.
        cast: Converts activations to the dtype that the product reads; not timed.
    """

    kind: str
    kernel: str
    dtype: torch.dtype
    sparsity: float
    pack: Callable[[Tensor], KernelWeight]
    cast: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def name(self) -> str:
        """Name in tables."""
        share = f" {self.sparsity:.0%}" if self.kind not in (DENSE, "2:4") else ""
        return f"{self.kind}{share}, {str(self.dtype).removeprefix('torch.')}, {self.kernel}"

    @property
    def is_dense(self) -> bool:
        """Whether it is the baseline of the other forms of its dtype."""
        return self.kind == DENSE


def forms_for(
    device: torch.device, dtype: torch.dtype, sparsities: Sequence[float], block: int, kinds: Sequence[str] = KINDS
) -> list[Form]:
    """Return the forms that a device may support, the dense one of each dtype first.

    Args:
        device: Device of the weights.
        dtype: A floating-point dtype.
        sparsities: Shares of weights to prune.
        block: Side of zero blocks.
        kinds: Kinds of sparsity, of `options.KINDS`.

    Returns:
        The dense forms, and all forms of these kinds.
    """
    return [f for f in _forms(device, dtype, sparsities, block) if f.is_dense or f.kind.partition(" ")[0] in kinds]


def _forms(device: torch.device, dtype: torch.dtype, sparsities: Sequence[float], block: int) -> Iterator[Form]:
    yield Form(DENSE, "torch", dtype, 0.0, _dense)
    for s in sparsities:
        zeros, blocks = partial(to_unstructured, sparsity=s), partial(to_zero_blocks, size=block, sparsity=s)
        yield Form("structured", "torch, fewer outputs", dtype, s, _after(partial(fewer_outputs, sparsity=s), _dense))
        yield Form("unstructured", "torch, dense", dtype, s, _after(zeros, _dense))
        if device.type == "cpu":
            yield Form("unstructured", "torch CSR", dtype, s, _after(zeros, _csr))
        yield Form(f"block {block}", "torch BSR", dtype, s, _after(blocks, partial(_bsr, block=block)))
        yield Form(f"block {block}", "laconic", dtype, s, _after(blocks, partial(pack_blocks, block=block)))
    yield Form("2:4", "cuSPARSELt", dtype, 0.5, lambda W: pack_cusparselt(to_2_of_4(W)))
    yield Form("2:4", "CUTLASS", dtype, 0.5, lambda W: _pack_cutlass(to_2_of_4(W)))
    if device.type == "cuda":
        yield from _narrow_forms(device)


def _narrow_forms(device: torch.device) -> Iterator[Form]:
    int8, fp8 = torch.int8, torch.float8_e4m3fn
    yield Form(DENSE, "torch", int8, 0.0, lambda W: _int8(_to_int8(W)), _to_int8)
    yield Form("2:4", "cuSPARSELt", int8, 0.5, lambda W: pack_cusparselt(to_2_of_4(_to_int8(W))), _to_int8)
    yield Form("2:4", "CUTLASS", int8, 0.5, lambda W: _pack_cutlass(to_2_of_4(_to_int8(W))), _to_int8)
    if cuda_capability(device) >= (8, 9):
        yield Form(DENSE, "torch", fp8, 0.0, lambda W: _fp8(W.to(fp8)), lambda x: x.to(fp8))
        yield Form("2:4", "cuSPARSELt", fp8, 0.5, lambda W: pack_cusparselt(to_2_of_4(W).to(fp8)), lambda x: x.to(fp8))


def _after(
    prune: Callable[[Tensor], Tensor], pack: Callable[[Tensor], KernelWeight]
) -> Callable[[Tensor], KernelWeight]:
    return lambda W: pack(prune(W))


def fewer_outputs(W: Tensor, sparsity: float) -> Tensor:
    """Return the first rows of a weight, as if a share of its outputs were removed.

    Args:
        W: (out, in).
        sparsity: Share of rows to remove; the number that remains is rounded to a multiple of 16, at least 16.
    """
    return W[: max(16, round((1 - sparsity) * W.shape[0] / 16) * 16)].contiguous()


def pack_blocks(W: Tensor, block: int) -> KernelWeight:
    """Pack a weight with zero blocks for Laconic's block-sparse kernel.

    Args:
        W: (out, in), both multiples of `block`.
        block: Side of the blocks.

    Returns:
        The packed weight.

    Raises:
        ValueError: The block size does not divide the weight.
    """
    blocks = to_block_sparse(W, (block, block))
    return KernelWeight(lambda x: block_sparse_linear(x, blocks), blocks.nbytes, blocks.values.numel(), W)


def pack_cusparselt(W: Tensor) -> KernelWeight:
    """Pack a weight with 2:4 zeros for cuSPARSELt.

    Args:
        W: (out, in) in bf16, fp16, int8 or fp8, on CUDA.

    Returns:
        The packed weight.

    Raises:
        RuntimeError: torch or the device has no such kernel.
    """
    return KernelWeight(*cusparselt(W), W.numel() // 2, W)


def _pack_cutlass(W: Tensor) -> KernelWeight:
    return KernelWeight(*cutlass(W), W.numel() // 2, W)


def _dense(W: Tensor) -> KernelWeight:
    return KernelWeight(lambda x: F.linear(x, W), W.nbytes, W.numel(), W)


def _csr(W: Tensor) -> KernelWeight:
    sparse = _without_warning(W.to_sparse_csr)
    return KernelWeight(lambda x: (sparse @ x.T.contiguous()).T, _compressed_bytes(sparse), sparse.values().numel(), W)


def _bsr(W: Tensor, block: int) -> KernelWeight:
    sparse = _without_warning(partial(W.to_sparse_bsr, (block, block)))
    multiply = (lambda x: F.linear(x, sparse)) if W.is_cuda else (lambda x: (sparse @ x.T.contiguous()).T)
    return KernelWeight(multiply, _compressed_bytes(sparse), sparse.values().numel(), W)


def _without_warning(convert: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* is in beta")
        return convert()


def _compressed_bytes(W: Tensor) -> int:
    return W.values().nbytes + W.col_indices().nbytes + W.crow_indices().nbytes


def _to_int8(x: Tensor) -> Tensor:
    """Round values of about unit variance to multiples of 1/16."""
    return (16 * x).round().clamp(-127, 127).to(torch.int8)


def _int8(W: Tensor) -> KernelWeight:
    return KernelWeight(lambda x: torch._int_mm(pad_rows(x, _MIN_ROWS), W.T)[: len(x)], W.nbytes, W.numel(), W)


def _fp8(W: Tensor) -> KernelWeight:
    one = torch.ones((), device=W.device)

    def multiply(x: Tensor) -> Tensor:
        y = torch._scaled_mm(pad_rows(x, _MIN_ROWS), W.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return y[: len(x)]

    return KernelWeight(multiply, W.nbytes, W.numel(), W)
