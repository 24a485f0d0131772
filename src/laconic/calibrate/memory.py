"""Memory: what there is to spare, and what is given back."""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress

import torch


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU has to spare; a CPU's are counted by the budget."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def give_back() -> None:
    """Have the allocator return what freed tensors left behind, in pieces that the next do not quite fit into."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
