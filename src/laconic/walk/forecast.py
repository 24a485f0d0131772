"""The size of the artifact and the peak memory of a walk, predicted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laconic.checkpoint.files import count_elements
from laconic.checkpoint.source import Source
from laconic.formats.storage import stored_bytes
from laconic.structure.anatomy import Tap, observation_rounds
from laconic.walk.plan import Plan

# Bytes that a weight of the tap in hand takes while it is searched, swept and packed: float32 and int64 temporaries.
_WORKING = 40


_ITEMSIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Forecast:
    """What the artifact will take, in bytes, and the peak memory of the walk. covered: share of all parameters that
    will be quantized."""

    bytes_before: int
    bytes_after: int
    peak_bytes: int
    covered: float


def forecast(plan: Plan, source: Source, samples: int, length: int) -> Forecast:
    """Predict size and memory from shapes alone. samples, length: of the calibration set (0 when there is none)."""
    item = _ITEMSIZE[source.dtype]
    sizes = {n: count_elements(s.shape) for n, s in source.checkpoint.tensors.items()}
    after = 0
    for name, size in sizes.items():
        linear = name.removesuffix(".weight")
        if linear in plan.schemes and name != linear:
            after += stored_bytes(plan.schemes[linear], plan.linears[linear], source.dtype)
        else:
            after += size * item
    quantized = sum(out * inp for n, (out, inp) in plan.linears.items() if n in plan.schemes)
    prefix = f"{plan.anatomy.blocks}.0."
    block = sum(s for n, s in sizes.items() if n.startswith(prefix)) * item
    widest = max((inp for n, (_, inp) in plan.linears.items() if n in plan.schemes), default=0)
    largest_tap = max((_tap_elements(plan, taps) for taps in plan.anatomy.taps), default=0)
    streams = 1 + plan.two_streams
    hidden = getattr(source.config.get_text_config(), "hidden_size", 0)
    activations = samples * length * hidden * item * streams if plan.calibrates else 0
    hessians = max(
        (_squares(plan, i, together) for i, t in enumerate(plan.anatomy.taps) for together in observation_rounds(t))
    )
    squares = (3 * widest * widest + hessians) * 4 if plan.calibrates else 0
    outside = sum(s for n, s in sizes.items() if not n.startswith(f"{plan.anatomy.blocks}.")) * item
    peak = max(block * (1 + streams) + largest_tap * _WORKING + squares, outside) + activations
    return Forecast(sum(sizes.values()) * item, after, peak, quantized / max(1, sum(sizes.values())))


def _squares(plan: Plan, i: int, taps: Sequence[Tap]) -> int:
    """Elements of the second moments of taps of block i that are observed together."""
    names = ([f"{plan.anatomy.block_name(i)}.{n}" for n in tap.linears] for tap in taps)
    return sum(plan.linears[n[0]][1] ** 2 for n in names if any(full in plan.schemes for full in n))


def _tap_elements(plan: Plan, taps: Sequence[Tap]) -> int:
    prefix = plan.anatomy.block_name(0)
    shapes = plan.linears
    return max(
        sum(count_elements(shapes[f"{prefix}.{n}"]) for n in t.linears if f"{prefix}.{n}" in shapes) for t in taps
    )
