"""Observing a block on the calibration set: moments of the inputs of its linears, and its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.runtime.linear import QLinear
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import Tap
from laconic.structure.calls import BlockCall


def observe(
    passes: Passes,
    taps: Sequence[Tap],
    *,
    gram: bool,
    original: Passes | None = None,
    column_scales: Mapping[str, Tensor] | None = None,
    advance: bool = False,
) -> dict[Tap, Moments]:
    """Observe the inputs of some taps of a block over the whole stream.

    Args:
        passes: through the block.
        taps: to observe.
        gram: whether second moments are needed.
        original: passes through the uncompressed block on the original model's activations, for cross moments.
        column_scales: what the columns of linears were multiplied by, by name. Their inputs were divided by it, and so
            are those of the original model.
        advance: whether passes go on to the end of the block, so that the stream holds its output afterwards;
            otherwise they halt before the last of the taps.

    Returns:
        The moments of the input of each tap.

    Raises:
        ValueError: if the inputs hold NaN or infinity.
    """
    widths = {tap: _width(passes.block, tap) for tap in taps}
    moments = {t: Moments(w, passes.device, gram=gram, cross=original is not None) for t, w in widths.items()}
    inputs = passes.inputs_and_advance(taps) if advance else passes.inputs(taps)
    originals: Iterator[tuple[Tap, Tensor] | None]
    originals = original.inputs(taps) if original else iter(lambda: None, object())
    for (tap, x), from_original in zip(inputs, originals, strict=False):
        moments[tap].add(x, _rescale(from_original[1], tap, column_scales or {}) if from_original else None)
    for tap_moments in moments.values():
        tap_moments.finish()
    return moments


def _width(block: nn.Module, tap: Tap) -> int:
    """Return the number of inputs of a tap's linears, some of which may be quantized already."""
    first = block.get_submodule(tap.linears[0])
    assert isinstance(first, nn.Linear | QLinear)
    return first.in_features


def _rescale(x: Tensor, tap: Tap, column_scales: Mapping[str, Tensor]) -> Tensor:
    columns = column_scales.get(tap.linears[0])
    return x if columns is None else x / columns


def no_tokens_error(linear: str) -> ValueError:
    """Return the error for an expert that must be observed, and to which no token was routed.

    Args:
        linear: full name of a linear of the expert.
    """
    return ValueError(
        f"{linear}: no calibration token was routed to this expert; use more samples, or set "
        "calibration.moe_calibrate_all_experts, and pass --overwrite, since finished blocks are of this recipe"
    )


def advance_stream(block: nn.Module, call: BlockCall, stream: Stream, device: torch.device) -> None:
    """Replace the stream's hidden states by the block's output.

    Args:
        block: decoder block.
        call: how the block is called.
        stream: hidden states before the block, changed in place.
        device: where to compute.
    """
    for samples, hidden in stream.numbered_batches():
        hidden.copy_(call(block, hidden.to(device), samples))
