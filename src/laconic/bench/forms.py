"""Ways to hold a linear's weight and to multiply by it: dense, sparse, smaller; in 16 bit, int8, fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.bench.semi_structured import cuda_capability, cusparselt, cutlass, pad_rows
from laconic.bench.zeros import to_2_of_4, to_unstructured, to_zero_blocks
from laconic.kernels.block_sparse import block_sparse_linear, to_blocks

DENSE = "dense"
DENSE_KERNEL = "torch, dense"
KINDS = ("structured", "unstructured", "block", "2:4")
# Int8 and fp8 products of torch's ask for more than 16 rows.
_ROWS = 32


@dataclass(frozen=True)
class Held:
    """A weight as a kernel reads it. nbytes: of it. call: x (tokens, in) to (tokens, out). weight: what it stands for,
    (out, in)."""

    call: Callable[[Tensor], Tensor]
    nbytes: int
    weight: Tensor


@dataclass(frozen=True)
class Form:
    """kind: `dense`, `unstructured`, `2:4`, `block N`, `structured`. kernel: whose. dtype: of the products' operands.
    sparsity: the share of the weights that is gone. hold: a dense weight (out, in) of floats, as this form keeps it,
    raises what torch raises where it cannot. cast: what the product reads of x, which is not timed.
    """

    kind: str
    kernel: str
    dtype: torch.dtype
    sparsity: float
    hold: Callable[[Tensor], Held]
    cast: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def name(self) -> str:
        """As tables have it."""
        share = f" {self.sparsity:.0%}" if self.kind not in (DENSE, "2:4") else ""
        return f"{self.kind}{share}, {str(self.dtype).removeprefix('torch.')}, {self.kernel}"

    @property
    def baseline(self) -> bool:
        """Whether others of its dtype are compared with it."""
        return self.kind == DENSE


def forms_for(
    device: torch.device, dtype: torch.dtype, sparsities: Sequence[float], block: int, kinds: Sequence[str] = KINDS
) -> list[Form]:
    """All forms of some kinds that a device may have, the dense one of each dtype first. dtype: a float type."""
    return [f for f in _forms(device, dtype, sparsities, block) if f.baseline or f.kind.partition(" ")[0] in kinds]


def _forms(device: torch.device, dtype: torch.dtype, sparsities: Sequence[float], block: int) -> Iterator[Form]:
    yield Form(DENSE, "torch", dtype, 0.0, _dense)
    for s in sparsities:
        yield Form("structured", "torch, fewer outputs", dtype, s, lambda W, s=s: _dense(fewer_outputs(W, s)))
        yield Form("unstructured", DENSE_KERNEL, dtype, s, lambda W, s=s: _dense(to_unstructured(W, s)))
        if device.type == "cpu":
            yield Form("unstructured", "torch CSR", dtype, s, lambda W, s=s: _csr(to_unstructured(W, s)))
        yield Form(f"block {block}", "torch BSR", dtype, s, lambda W, s=s: _bsr(to_zero_blocks(W, block, s), block))
        yield Form(f"block {block}", "laconic", dtype, s, lambda W, s=s: blocked(to_zero_blocks(W, block, s), block))
    yield Form("2:4", "cuSPARSELt", dtype, 0.5, lambda W: cusparselt_held(to_2_of_4(W)))
    yield Form("2:4", "CUTLASS", dtype, 0.5, lambda W: _cutlass_held(to_2_of_4(W)))
    if device.type != "cuda":
        return
    int8 = torch.int8
    yield Form(DENSE, "torch", int8, 0.0, lambda W: _int8(_to_int8(W)), _to_int8)
    yield Form("2:4", "cuSPARSELt", int8, 0.5, lambda W: cusparselt_held(to_2_of_4(_to_int8(W))), _to_int8)
    yield Form("2:4", "CUTLASS", int8, 0.5, lambda W: _cutlass_held(to_2_of_4(_to_int8(W))), _to_int8)
    if cuda_capability(device) >= (8, 9):
        fp8 = torch.float8_e4m3fn
        yield Form(DENSE, "torch", fp8, 0.0, lambda W: _fp8(W.to(fp8)), lambda x: x.to(fp8))
        yield Form("2:4", "cuSPARSELt", fp8, 0.5, lambda W: cusparselt_held(to_2_of_4(W).to(fp8)), lambda x: x.to(fp8))


def fewer_outputs(W: Tensor, sparsity: float) -> Tensor:
    """The first rows of W (out, in), so many that this share is gone, to the nearest 16."""
    return W[: max(16, round((1 - sparsity) * W.shape[0] / 16) * 16)].contiguous()


def blocked(W: Tensor, block: int) -> Held:
    """By our own kernel, W (out, in) in blocks (block, block)."""
    kept = to_blocks(W, (block, block))
    return Held(lambda x: block_sparse_linear(x, kept), kept.nbytes, W)


def cusparselt_held(W: Tensor) -> Held:
    """By cuSPARSELt, W (out, in) with 2:4 zeros."""
    return Held(*cusparselt(W), W)


def _cutlass_held(W: Tensor) -> Held:
    return Held(*cutlass(W), W)


def _dense(W: Tensor) -> Held:
    return Held(lambda x: F.linear(x, W), W.nbytes, W)


def _csr(W: Tensor) -> Held:
    kept = W.to_sparse_csr()
    nbytes = kept.values().nbytes + kept.col_indices().nbytes + kept.crow_indices().nbytes
    return Held(lambda x: (kept @ x.T.contiguous()).T, nbytes, W)


def _bsr(W: Tensor, block: int) -> Held:
    kept = W.to_sparse_bsr((block, block))
    nbytes = kept.values().nbytes + kept.col_indices().nbytes + kept.crow_indices().nbytes
    if W.is_cuda:
        return Held(lambda x: F.linear(x, kept), nbytes, W)
    return Held(lambda x: (kept @ x.T.contiguous()).T, nbytes, W)


def _to_int8(x: Tensor) -> Tensor:
    """Numbers of about the spread of a normal distribution, in steps of 1/16."""
    return (16 * x).round().clamp(-127, 127).to(torch.int8)


def _int8(W: Tensor) -> Held:
    return Held(lambda x: torch._int_mm(pad_rows(x, _ROWS), W.T)[: len(x)], W.nbytes, W)


def _fp8(W: Tensor) -> Held:
    one = torch.ones((), device=W.device)

    def call(x: Tensor) -> Tensor:
        return torch._scaled_mm(pad_rows(x, _ROWS), W.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)[: len(x)]

    return Held(call, W.nbytes, W)
