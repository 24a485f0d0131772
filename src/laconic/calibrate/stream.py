"""The calibration set between two blocks: its hidden states, in memory or in a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """The calibration set's hidden states between two blocks: (samples, tokens, hidden), changed in place as the
    walk goes on. They live in memory, or in a file mapped into memory past the budget."""

    hidden: Tensor
    batch: int

    def batches(self) -> Iterator[Tensor]:
        """Views of a few samples each."""
        yield from self.hidden.split(self.batch)


@dataclass(frozen=True)
class Room:
    """Where a stream may be. budget: bytes; when it would take more it is kept in the file `spill`."""

    budget: float
    spill: Path

    def stream(self, shape: tuple[int, int, int], dtype: torch.dtype, batch: int) -> Stream:
        """A new stream, its hidden states yet unset."""
        return make_stream(shape, dtype, batch, self.budget, self.spill)

    def copy_of(self, other: Stream) -> Stream:
        """Another stream with the same hidden states."""
        samples, tokens, width = other.hidden.shape
        made = self.stream((samples, tokens, width), other.hidden.dtype, other.batch)
        made.hidden.copy_(other.hidden)
        return made


def make_stream(shape: tuple[int, int, int], dtype: torch.dtype, batch: int, budget: float, spill: Path) -> Stream:
    """Room for hidden states. budget: bytes; when they would take more they are kept in the file `spill`."""
    size = shape[0] * shape[1] * shape[2]
    if size * dtype.itemsize <= budget:
        return Stream(torch.empty(shape, dtype=dtype), batch)
    _reserve(spill, size * dtype.itemsize)
    return Stream(torch.from_file(str(spill), shared=True, size=size, dtype=dtype).view(shape), batch)


def _reserve(file: Path, size: int) -> None:
    """Take the room on the disk now: a mapped file that finds none later would end the process without a word."""
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("wb") as f:
        try:
            os.posix_fallocate(f.fileno(), 0, size)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"the disk of {file.parent} has no room for {size / 1e9:.1f} GB of calibration activations; free some, "
                "raise calibration.max_memory_gb, or use fewer samples"
            ) from e
