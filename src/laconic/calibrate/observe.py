"""Watching a block run on the calibration set: the moments of its linears' inputs, and what it passes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.runtime.linear import QLinear
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import BlockCall, Tap


def observe(
    passes: Passes,
    taps: Sequence[Tap],
    *,
    gram: bool,
    original: Passes | None = None,
    column_scales: Mapping[str, Tensor] | None = None,
    through: bool = False,
) -> dict[Tap, Moments]:
    """Moments at some taps of a block, over the whole stream; the passes halt before the last of the taps, or go
    through the block, so that the stream holds its output after.

    original: passes through the uncompressed block on the original model's activations, for cross moments. column_scales: what
    the columns of linears were multiplied by, by name. Their inputs were divided by it, and so the original's are.
    """
    widths = {tap: _width(passes.block, tap) for tap in taps}
    moments = {t: Moments(w, passes.device, gram=gram, cross=original is not None) for t, w in widths.items()}
    full: Iterator[tuple[Tap, Tensor] | None] = original.inputs(taps) if original else iter(lambda: None, object())
    for (tap, x), other in zip(passes.through(taps) if through else passes.inputs(taps), full, strict=False):
        moments[tap].add(x, _rescaled(other[1], tap, column_scales or {}) if other else None)
    for found in moments.values():
        found.finish()
    return moments


def _width(block: nn.Module, tap: Tap) -> int:
    """How many inputs the linears of a tap have, some of which may be quantized already."""
    first = block.get_submodule(tap.linears[0])
    assert isinstance(first, nn.Linear | QLinear)
    return first.in_features


def _rescaled(x: Tensor, tap: Tap, column_scales: Mapping[str, Tensor]) -> Tensor:
    columns = column_scales.get(tap.linears[0])
    return x if columns is None else x / columns


def no_tokens(expert: str) -> ValueError:
    """What to tell of an expert that a method has to observe and could not."""
    return ValueError(
        f"{expert}: no calibration token was routed to this expert; use more samples, or set "
        "calibration.moe_calibrate_all_experts, and pass --overwrite, since what is finished is of this recipe"
    )


def advance(block: nn.Module, call: BlockCall, stream: Stream, device: torch.device) -> None:
    """Replace the stream's hidden states by the block's output."""
    for hidden in stream.batches():
        hidden.copy_(call(block, hidden.to(device)))
