"""2:4 sparse products on NVIDIA's sparse tensor cores, through torch's cuSPARSELt and CUTLASS kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Product = tuple[Callable[[Tensor], Tensor], int]
"""A function that multiplies x (tokens, in), and the bytes of the weight that it reads."""


def cusparselt(W: Tensor) -> Product:
    """Pack a weight with 2:4 zeros for cuSPARSELt; its fastest algorithm is searched once per number of tokens.

    Args:
        W: (out, in) in bf16, fp16, int8 or fp8, on CUDA.

    Returns:
        The product; for int8 and fp8 its result is bfloat16.

    Raises:
        RuntimeError: torch or the device has no such kernel.
    """
    _check(W)
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch comes without cuSPARSELt")
    packed = torch._cslt_compress(W)
    narrow = W.element_size() == 1
    out: dict[str, Any] = {"out_dtype": torch.bfloat16} if narrow else {}
    algorithms: dict[int, int] = {}

    def multiply(x: Tensor) -> Tensor:
        x_t = pad_rows(x, 16 if narrow else 8).T
        tokens = x_t.shape[1]
        if tokens not in algorithms:
            # Never searched during the capture of a graph, because a call is run before its capture.
            algorithms[tokens] = int(torch._cslt_sparse_mm_search(packed, x_t, transpose_result=True, **out))
        return torch._cslt_sparse_mm(packed, x_t, transpose_result=True, alg_id=algorithms[tokens], **out)[: len(x)]

    return multiply, packed.nbytes


def cutlass(W: Tensor) -> Product:
    """Pack a weight with 2:4 zeros for torch's CUTLASS kernel.

    Args:
        W: (out, in) in bf16, fp16 or int8, on CUDA.

    Returns:
        The product.

    Raises:
        RuntimeError: torch or the device has no such kernel.
        ValueError: The kernel does not support the shape.
    """
    _check(W)
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    sparse = SparseSemiStructuredTensorCUTLASS.from_dense(W)
    nbytes = sum(t.nbytes for t in (sparse.packed, sparse.meta) if t is not None)
    return lambda x: F.linear(x, sparse), nbytes


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Append rows of zeros up to the multiple that a kernel requires.

    Args:
        x: (tokens, in).
        multiple: The number of rows becomes a multiple of this.

    Returns:
        (tokens rounded up, in) of the same dtype; `x` itself if nothing is missing.
    """
    missing = -len(x) % multiple
    # F.pad does not support fp8.
    as_bytes = x.view(torch.int8) if x.element_size() == 1 else x
    return F.pad(as_bytes, (0, 0, 0, missing)).view(x.dtype) if missing else x


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, such as (9, 0) for Hopper.

    Args:
        device: A CUDA device.
    """
    return torch.cuda.get_device_capability(device)


def _check(W: Tensor) -> None:
    if not W.is_cuda:
        raise RuntimeError("2:4 products need an NVIDIA GPU")
    if cuda_capability(W.device) < (8, 0):
        raise RuntimeError("2:4 products need an NVIDIA GPU of compute capability 8.0 or more")
