"""The calibration set on its way through the model: embedded, and then passed on from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from laconic.calibrate.memory import free_memory
from laconic.calibrate.stream import Room, Stream
from laconic.checkpoint.source import Source
from laconic.structure.anatomy import BlockCall, capture_calls
from laconic.walk.outside import forget_outside, materialise_outside
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings

# What a pass that waits before a tap holds, in sizes of its hidden states: a gated MLP's input, mostly.
_HELD = 8


@dataclass(frozen=True)
class Flow:
    """The calibration set on its way: how each block is called, the compressed model's stream, the original's.
    held: whether there is room for halted passes. room: for one more stream of the kind."""

    calls: Sequence[BlockCall]
    stream: Stream
    original: Stream | None
    held: bool
    room: Room


def embed(
    windows: Tensor, source: Source, model: PreTrainedModel, plan: Plan, settings: Settings, folder: Path
) -> Flow:
    """Hidden states as the first block gets them, of token ids (samples, tokens). folder: where they are kept past the
    budget."""
    samples, tokens = windows.shape
    device, dtype = settings.device, source.dtype
    materialise_outside(model, plan.anatomy, source, device, embeddings=True)
    _, calls = capture_calls(model, plan.anatomy.blocks, input_ids=windows[:1].to(device))
    width = source.config.get_text_config().hidden_size
    count = 1 + plan.two_streams
    budget = settings.budget / count
    rooms = [Room(budget, folder / f"activations-{i}.writing") for i in range(count + 1)]
    made = [r.stream((samples, tokens, width), dtype, settings.batch) for r in rooms[:count]]
    for ids, *hidden in zip(windows.split(settings.batch), *(s.batches() for s in made), strict=True):
        embedded, _ = capture_calls(model, plan.anatomy.blocks, input_ids=ids.to(device))
        for h in hidden:
            h.copy_(embedded)
    forget_outside(model, plan.anatomy)
    held = made[0].hidden.nbytes * count * _HELD <= min(settings.budget, free_memory(device) / 2)
    return Flow([c.to(device) for c in calls], made[0], made[1] if count > 1 else None, held, rooms[-1])


def passes_on(plan: Plan, i: int) -> bool:
    """Whether a stage's passes may replace what block i reads by what it puts out: nothing looks at it after."""
    return read_after(plan, i) and not plan.calibrates_cache


def read_after(plan: Plan, i: int) -> bool:
    """Whether anything reads what block i puts out: the next block, or a stage that observes the head."""
    head = plan.anatomy.head
    observed = any(s.needs.observation and head in names for s, names in zip(plan.stages, plan.targets, strict=True))
    return i + 1 < len(plan.anatomy.taps) or observed
