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
    """Hidden states of the calibration set between two blocks, changed in place from block to block.

    Attributes:
        hidden: (samples, tokens, hidden), in memory or in a file that is mapped into memory.
        batch: samples run at once.
    """

    hidden: Tensor
    batch: int

    def batches(self) -> Iterator[Tensor]:
        """Yield views of `batch` samples each."""
        yield from self.hidden.split(self.batch)

    def numbered_batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the numbers of the samples of each batch, and its view."""
        starts = range(0, len(self.hidden), self.batch)
        yield from ((slice(i, i + self.batch), batch) for i, batch in zip(starts, self.batches(), strict=True))


@dataclass(frozen=True)
class StreamStorage:
    """Storage of a stream's hidden states: memory, or a file for a stream that exceeds the budget.

    Attributes:
        budget: bytes that a stream may take in memory; a larger one is stored in a file.
        file: the file.
    """

    budget: float
    file: Path

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype, batch: int) -> Stream:
        """Allocate a stream, its hidden states not set yet.

        Args:
            shape: (samples, tokens, hidden).
            dtype: of the hidden states.
            batch: samples run at once.

        Returns:
            A stream in memory if it fits the budget, otherwise in the file.

        Raises:
            ValueError: if the disk has no space for the file.
        """
        size = shape[0] * shape[1] * shape[2]
        if size * dtype.itemsize <= self.budget:
            return Stream(torch.empty(shape, dtype=dtype), batch)
        _reserve(self.file, size * dtype.itemsize)
        return Stream(torch.from_file(str(self.file), shared=True, size=size, dtype=dtype).view(shape), batch)

    def copy(self, stream: Stream) -> Stream:
        """Return a copy of another stream, stored here.

        Args:
            stream: the stream to copy, stored elsewhere.

        Raises:
            ValueError: if the disk has no space for the file.
        """
        samples, tokens, width = stream.hidden.shape
        copy = self.allocate((samples, tokens, width), stream.hidden.dtype, stream.batch)
        copy.hidden.copy_(stream.hidden)
        return copy


def _reserve(file: Path, size: int) -> None:
    """Reserve disk space for a mapped file: without it a full disk would kill the process with no message."""
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
