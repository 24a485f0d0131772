"""Ways to hold a linear's weight and to multiply by it: dense, sparse, smaller; in 16 bit, int8, fp8."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.bench.semi_structured import cuda_capability, cusparselt, cutlass, pad_rows
from laconic.bench.zeros import to_2_of_4, to_unstructured, to_zero_blocks
from laconic.kernels.block_sparse import block_sparse_linear
from laconic.kernels.block_sparse_weight import to_block_sparse

DENSE = "dense"
KINDS = ("structured", "unstructured", "block", "2:4")
# Int8 and fp8 products of torch's ask for more than 16 rows.
_ROWS = 32


@dataclass(frozen=True)
class Held:
    """A weight as a kernel reads it. call: x (tokens, in) to (tokens, out). nbytes: of the weight. kept: how many of
    its numbers are multiplied. weight: what it stands for, (out, in)."""

    call: Callable[[Tensor], Tensor]
    nbytes: int
    kept: int
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
        zeros, blocks = partial(to_unstructured, sparsity=s), partial(to_zero_blocks, size=block, sparsity=s)
        yield Form("structured", "torch, fewer outputs", dtype, s, _after(partial(fewer_outputs, sparsity=s), _dense))
        yield Form("unstructured", "torch, dense", dtype, s, _after(zeros, _dense))
        if device.type == "cpu":
            yield Form("unstructured", "torch CSR", dtype, s, _after(zeros, _csr))
        yield Form(f"block {block}", "torch BSR", dtype, s, _after(blocks, partial(_bsr, block=block)))
        yield Form(f"block {block}", "laconic", dtype, s, _after(blocks, partial(blocked, block=block)))
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


def _after(prune: Callable[[Tensor], Tensor], hold: Callable[[Tensor], Held]) -> Callable[[Tensor], Held]:
    return lambda W: hold(prune(W))


def fewer_outputs(W: Tensor, sparsity: float) -> Tensor:
    """The first rows of W (out, in), so many that this share is gone, to the nearest 16."""
    return W[: max(16, round((1 - sparsity) * W.shape[0] / 16) * 16)].contiguous()


def blocked(W: Tensor, block: int) -> Held:
    """By our own kernel, W (out, in) in blocks (block, block)."""
    kept = to_block_sparse(W, (block, block))
    return Held(lambda x: block_sparse_linear(x, kept), kept.nbytes, kept.values.numel(), W)


def cusparselt_held(W: Tensor) -> Held:
    """By cuSPARSELt, W (out, in) with 2:4 zeros."""
    return Held(*cusparselt(W), W.numel() // 2, W)


def _cutlass_held(W: Tensor) -> Held:
    return Held(*cutlass(W), W.numel() // 2, W)


def _dense(W: Tensor) -> Held:
    return Held(lambda x: F.linear(x, W), W.nbytes, W.numel(), W)


def _csr(W: Tensor) -> Held:
    kept = _compressed(W.to_sparse_csr)
    return Held(lambda x: (kept @ x.T.contiguous()).T, _compressed_bytes(kept), kept.values().numel(), W)


def _bsr(W: Tensor, block: int) -> Held:
    kept = _compressed(partial(W.to_sparse_bsr, (block, block)))
    call = (lambda x: F.linear(x, kept)) if W.is_cuda else (lambda x: (kept @ x.T.contiguous()).T)
    return Held(call, _compressed_bytes(kept), kept.values().numel(), W)


def _compressed(make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* is in beta")
        return make()


def _compressed_bytes(W: Tensor) -> int:
    return W.values().nbytes + W.col_indices().nbytes + W.crow_indices().nbytes


def _to_int8(x: Tensor) -> Tensor:
    """Numbers of about the spread of a normal distribution, in steps of 1/16."""
    return (16 * x).round().clamp(-127, 127).to(torch.int8)


def _int8(W: Tensor) -> Held:
    return Held(lambda x: torch._int_mm(pad_rows(x, _ROWS), W.T)[: len(x)], W.nbytes, W.numel(), W)


def _fp8(W: Tensor) -> Held:
    one = torch.ones((), device=W.device)

    def call(x: Tensor) -> Tensor:
        return torch._scaled_mm(pad_rows(x, _ROWS), W.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)[: len(x)]

    return Held(call, W.nbytes, W.numel(), W)
