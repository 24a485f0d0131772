"""2:4 sparse products on NVIDIA's sparse tensor cores, through torch: cuSPARSELt's kernels, and CUTLASS'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Product = tuple[Callable[[Tensor], Tensor], int]
"""What multiplies x (tokens, in), and the bytes that it reads of the weight."""


def cusparselt(W: Tensor) -> Product:
    """W (out, in) with 2:4 zeros, on CUDA: bf16, fp16, int8 or fp8. For each number of tokens the library's fastest
    algorithm is searched once. Int8 and fp8 put out bfloat16.

    Raises: RuntimeError where torch or the device has no such kernel.
    """
    _check(W)
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch comes without cuSPARSELt")
    packed = torch._cslt_compress(W)
    narrow = W.element_size() == 1
    out: dict[str, Any] = {"out_dtype": torch.bfloat16} if narrow else {}
    algorithms: dict[int, int] = {}

    def call(x: Tensor) -> Tensor:
        read = pad_rows(x, 16 if narrow else 8).T
        tokens = read.shape[1]
        if tokens not in algorithms:
            # Not while a graph is captured: what is captured has run before.
            algorithms[tokens] = int(torch._cslt_sparse_mm_search(packed, read, transpose_result=True, **out))
        return torch._cslt_sparse_mm(packed, read, transpose_result=True, alg_id=algorithms[tokens], **out)[: len(x)]

    return call, packed.nbytes


def cutlass(W: Tensor) -> Product:
    """W (out, in) with 2:4 zeros, on CUDA: bf16, fp16 or int8, by torch.sparse.to_sparse_semi_structured's fallback.

    Raises: RuntimeError or ValueError where torch or the device has no such kernel.
    """
    _check(W)
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    kept = SparseSemiStructuredTensorCUTLASS.from_dense(W)
    nbytes = sum(t.nbytes for t in (kept.packed, kept.meta) if t is not None)
    return lambda x: F.linear(x, kept), nbytes


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x (tokens, in) with rows of zeros up to a multiple, as kernels ask for."""
    short = -len(x) % multiple
    # F.pad knows no fp8.
    as_bytes = x.view(torch.int8) if x.element_size() == 1 else x
    return F.pad(as_bytes, (0, 0, 0, short)).view(x.dtype) if short else x


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) of a Hopper."""
    return torch.cuda.get_device_capability(device)


def _check(W: Tensor) -> None:
    if not W.is_cuda:
        raise RuntimeError("2:4 products need an NVIDIA GPU")
    if cuda_capability(W.device) < (8, 0):
        raise RuntimeError("2:4 products need an NVIDIA GPU of compute capability 8.0 or more")
