"""Sizes of the chunks in which large tensors are processed.

Elementwise passes over a large tensor are bound by memory; passes over a chunk stay in a CPU's cache.
"""

from __future__ import annotations

from torch import Tensor

_CPU_ELEMENTS = 1 << 18
_GPU_ELEMENTS = 1 << 26


def chunk_elements(t: Tensor) -> int:
    """Return the number of elements of a chunk.

    On a CPU few enough for several passes in the cache, and enough to outweigh the cost of a call. A GPU gains nothing
    from small chunks; there they only bound the memory of temporaries.

    Args:
        t: The tensor, on its device.
    """
    return _GPU_ELEMENTS if t.is_cuda else _CPU_ELEMENTS


def chunk_rows(t: Tensor) -> int:
    """Return the number of rows of a chunk, at least one; a row is all that lies along the first dimension.

    Args:
        t: The tensor, of one or more dimensions, on its device.
    """
    return max(1, chunk_elements(t) * len(t) // max(1, t.numel()))
