"""How much of a large tensor to work on at a time: elementwise passes are bound by memory, unless it stays in cache."""

from __future__ import annotations

from torch import Tensor

_CACHE = 1 << 18
_GPU = 1 << 26


def at_once(t: Tensor) -> int:
    """Elements few enough that several passes over them stay in a CPU's cache, and enough to be worth a call. A GPU
    gains nothing from small pieces; there they only bound the memory."""
    return _GPU if t.is_cuda else _CACHE


def rows_at_once(t: Tensor) -> int:
    """The same in rows (all that lies along the first dimension), at least one."""
    return max(1, at_once(t) * len(t) // max(1, t.numel()))
