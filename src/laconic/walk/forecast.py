"""The size of the artifact and the peak memory of a walk, predicted from shapes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from laconic.checkpoint.files import count_elements
from laconic.checkpoint.source import Source
from laconic.formats.storage import stored_bytes
from laconic.structure.anatomy import Tap, observation_rounds
from laconic.walk.plan import Plan

# Bytes per weight of the tap that is compressed, for range search, column loop and packing: float32 and int64 copies.
_WORKING = 40

_ITEMSIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Forecast:
    """Predicted size of the artifact and memory of the walk.

    Attributes:
        bytes_before: size of the original weights, in bytes.
        bytes_after: size of the artifact's weights, in bytes.
        peak_bytes: peak memory of the walk, in bytes.
        covered: share of all parameters that will be quantized.
    """

    bytes_before: int
    bytes_after: int
    peak_bytes: int
    covered: float


def forecast(plan: Plan, source: Source, samples: int, length: int, extra: Collection[str] = ()) -> Forecast:
    """Predict size and memory from shapes alone.

    Args:
        plan: of the walk.
        source: the checkpoint.
        samples: of the calibration set; 0 if there is none.
        length: tokens of a sample.
        extra: names of tensors that are not part of the text model.

    Returns:
        Sizes and peak memory in bytes; what only calibration decides, such as columns in 16 bit, does not count.
    """
    itemsize = _ITEMSIZE[source.dtype]
    sizes = {n: count_elements(s.shape) for n, s in source.checkpoint.tensors.items()}
    after = 0
    for name, size in sizes.items():
        linear = name.removesuffix(".weight")
        if linear in plan.schemes and name != linear:
            after += stored_bytes(plan.schemes[linear], plan.linears[linear], source.dtype)
        else:
            after += size * itemsize
    quantized = sum(rows * columns for n, (rows, columns) in plan.linears.items() if n in plan.schemes)
    peak = _peak_bytes(plan, source, sizes, samples * length, extra)
    # A quantized source is counted as it is stored; a head that is untied from the embeddings has no bytes there.
    stored = source.checkpoint.tensors
    coded = {s.key: s.decoding.parts.values() for s in stored.values() if s.decoding}
    once = {(s.file, s.key, s.index, s.rows): n for n, s in stored.items()}.values()
    before = sum(sizes[n] * itemsize for n in once if not stored[n].decoding)
    before += sum(part.nbytes for parts in coded.values() for part in parts)
    return Forecast(before, after, peak, quantized / max(1, sum(sizes.values())))


def _peak_bytes(plan: Plan, source: Source, sizes: dict[str, int], tokens: int, extra: Collection[str]) -> int:
    """Return the peak memory. sizes: elements of the checkpoint's tensors, by name. tokens: of the calibration set."""
    itemsize, streams = _ITEMSIZE[source.dtype], 1 + plan.two_streams
    prefix = f"{plan.anatomy.blocks}."
    block = sum(s for n, s in sizes.items() if n.startswith(f"{prefix}0.")) * itemsize
    outside = sum(s for n, s in sizes.items() if not n.startswith(prefix) and n not in extra) * itemsize
    largest_tap = max((_tap_elements(plan, taps) for taps in plan.anatomy.taps), default=0)
    hidden = getattr(source.config.get_text_config(), "hidden_size", 0)
    activations = tokens * hidden * itemsize * streams if plan.calibrates else 0
    widest = max((columns for n, (_, columns) in plan.linears.items() if n in plan.schemes), default=0)
    hessians = max(
        (_hessian_elements(plan, i, taps) for i, t in enumerate(plan.anatomy.taps) for taps in observation_rounds(t))
    )
    squares = (3 * widest * widest + hessians) * 4 if plan.calibrates else 0
    return max(block * (1 + streams) + largest_tap * _WORKING + squares, outside) + activations


def _hessian_elements(plan: Plan, i: int, taps: Sequence[Tap]) -> int:
    """Return the elements of the second moments of taps of block i that are observed together."""
    linears = ([f"{plan.anatomy.block_name(i)}.{n}" for n in tap.linears] for tap in taps)
    return sum(plan.linears[names[0]][1] ** 2 for names in linears if any(n in plan.schemes for n in names))


def _tap_elements(plan: Plan, taps: Sequence[Tap]) -> int:
    prefix = plan.anatomy.block_name(0)
    shapes = plan.linears
    return max(
        sum(count_elements(shapes[f"{prefix}.{n}"]) for n in t.linears if f"{prefix}.{n}" in shapes) for t in taps
    )
