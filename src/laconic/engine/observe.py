"""Watching a block run on the calibration set: moments of its linears' inputs, and the activations it passes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.model.anatomy import Call, Stopped, Tap, linear_at
from laconic.solvers.moments import Moments


@dataclass(frozen=True)
class Stream:
    """The calibration set's hidden states between two blocks: (samples, tokens, hidden), changed in place as the
    walk goes on. They live in memory, or in a file mapped into memory past the budget."""

    hidden: Tensor
    batch: int

    def batches(self) -> Iterator[Tensor]:
        """Views of a few samples each."""
        yield from self.hidden.split(self.batch)


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


@torch.no_grad()
def observe(
    block: nn.Module,
    taps: Sequence[Tap],
    call: Call,
    stream: Stream,
    device: torch.device,
    *,
    gram: bool,
    original: tuple[nn.Module, Stream] | None = None,
) -> dict[Tap, Moments]:
    """Moments at some taps of a block, over the whole stream; the block runs no further than the last of them.

    original: the uncompressed block and its own stream, for cross moments.
    """
    widths = {tap: linear_at(block, tap.linears[0]).in_features for tap in taps}
    moments = {t: Moments(w, device, gram=gram, asymmetric=original is not None) for t, w in widths.items()}
    others = original[1].batches() if original else iter(())
    for hidden in stream.batches():
        full: dict[Tap, Tensor] = {}
        if original:
            _watch(original[0], taps, call, next(others).to(device), full)
        seen: dict[Tap, Tensor] = {}
        _watch(block, taps, call, hidden.to(device), seen)
        for tap in taps:
            if tap in seen:  # no token may be routed to an expert
                moments[tap].add(seen[tap], full.get(tap))
    for found in moments.values():
        found.check()
    return moments


@torch.no_grad()
def advance(block: nn.Module, call: Call, stream: Stream, device: torch.device) -> None:
    """Replace the stream's hidden states by the block's output."""
    for hidden in stream.batches():
        hidden.copy_(call(block, hidden.to(device)))


def _watch(block: nn.Module, taps: Sequence[Tap], call: Call, hidden: Tensor, into: dict[Tap, Tensor]) -> None:
    def hook(tap: Tap) -> Any:
        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            into[tap] = args[0]
            if len(into) == len(taps):
                raise Stopped

        return remember

    handles = [block.get_submodule(t.linears[0]).register_forward_pre_hook(hook(t)) for t in taps]
    try:
        call(block, hidden)
    except Stopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
