"""Memory that is available on a device, and memory that the allocator holds although it is free."""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress

import torch


def available_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU; infinity for a CPU, whose memory the budget of activations limits.

    Args:
        device: a GPU, or the CPU.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def trim_heap() -> None:
    """Return the memory of freed tensors to the operating system.

    glibc keeps it in blocks that the next tensors do not quite fit into, so that the process grows from block to block.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
