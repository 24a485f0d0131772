"""The calibration set on its way through the model: embedded, and then advanced from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from laconic.calibrate.stream import Stream, StreamStorage
from laconic.checkpoint.source import Source
from laconic.structure.calls import BlockCall, embed_ids, record_calls
from laconic.walk.embeddings import compressed_embeddings
from laconic.walk.memory import available_memory
from laconic.walk.outside import free_outside, materialise_outside
from laconic.walk.plan import Plan
from laconic.walk.settings import Settings

# Memory of a halted pass, in sizes of its hidden states: mostly the input of a gated MLP's down projection.
_HALTED_PASS_SIZE = 8


@dataclass(frozen=True)
class Flow:
    """The calibration set before the current block.

    Attributes:
        calls: how each block is called.
        stream: hidden states in the compressed model.
        original: hidden states in the original model, if a stage compares with them.
        resume_passes: whether there is memory for halted passes.
        storage: for one more stream of this size.
    """

    calls: Sequence[BlockCall]
    stream: Stream
    original: Stream | None
    resume_passes: bool
    storage: StreamStorage


def embed(
    windows: Tensor,
    source: Source,
    model: PreTrainedModel,
    *,
    plan: Plan,
    settings: Settings,
    folder: Path,
    original: bool = False,
) -> Flow:
    """Compute the hidden states before the first block.

    Args:
        windows: token ids (samples, tokens).
        source: the checkpoint.
        model: a skeleton.
        plan: of the walk.
        settings: where to compute, and in how much memory.
        folder: for the files of streams that exceed the memory.
        original: whether the stream is that of the original model, where a stage compresses the embeddings.

    Returns:
        The calibration set before the first block.

    Raises:
        ValueError: if the disk has no space for the files.
    """
    samples, tokens = windows.shape
    device, dtype = settings.device, source.dtype
    materialise_outside(model, plan.anatomy, source, device, embeddings=True)
    calls = record_calls(model, plan.anatomy.blocks, windows.to(device), settings.budget)
    width = source.config.get_text_config().hidden_size
    count = 1 + plan.two_streams
    budget = settings.budget / count
    storages = [StreamStorage(budget, folder / f"activations-{i}.writing") for i in range(count + 1)]
    streams = [s.allocate((samples, tokens, width), dtype, settings.batch) for s in storages[:count]]
    compressed = not original and plan.anatomy.embeddings in plan.schemes
    if compressed:
        with compressed_embeddings(model, plan, source, device):
            _embed_into(streams[:1], windows, model, plan, settings)
    _embed_into(streams[compressed:], windows, model, plan, settings)
    free_outside(model, plan.anatomy)
    halted = streams[0].hidden.nbytes * count * _HALTED_PASS_SIZE
    resume_passes = halted <= min(settings.budget, available_memory(device) / 2)
    second = streams[1] if plan.two_streams else None
    return Flow([c.to(device) for c in calls], streams[0], second, resume_passes, storages[-1])


def _embed_into(
    streams: Sequence[Stream], windows: Tensor, model: PreTrainedModel, plan: Plan, settings: Settings
) -> None:
    if not streams:
        return
    for ids, *batches in zip(windows.split(settings.batch), *(s.batches() for s in streams), strict=True):
        embedded = embed_ids(model, plan.anatomy.blocks, ids.to(settings.device))
        for batch in batches:
            batch.copy_(embedded)


def may_advance(plan: Plan, i: int) -> bool:
    """Return whether the passes of a stage may replace the input of block i by its output.

    They may if the output is read, and nothing observes the input after the stage.

    Args:
        plan: of the walk.
        i: number of the block.
    """
    return output_is_read(plan, i) and not plan.calibrates_cache


def output_is_read(plan: Plan, i: int) -> bool:
    """Return whether the output of block i is needed: by the next block, or by a stage that observes the head.

    Args:
        plan: of the walk.
        i: number of the block.
    """
    head = plan.anatomy.head
    observed = any(needs.observation and head in names for needs, names in zip(plan.needs, plan.targets, strict=True))
    return i + 1 < len(plan.anatomy.taps) or observed
