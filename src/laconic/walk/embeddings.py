"""Quantized input embeddings: compressed without calibration, and looked up while the model streams.

A table is compressed twice, with the same result: before the first block, whose inputs are then those of the compressed
model, and when it is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from laconic.checkpoint.source import Source
from laconic.formats import Quantized
from laconic.runtime.embedding import QEmbedding, make_embedding
from laconic.solvers.masks import single_linear
from laconic.stages.linear import LinearStage, LinearTask
from laconic.walk.plan import Plan
from laconic.walk.side_tensors import compress_stack


def compress_embeddings(
    model: PreTrainedModel, plan: Plan, source: Source, device: torch.device
) -> tuple[QEmbedding, dict[str, Any]]:
    """Compress the input embeddings, which a stage of the plan must target.

    Args:
        model: a skeleton; it is left as it is.
        plan: of the walk.
        source: the checkpoint.
        device: where to compute.

    Returns:
        The compressed table, and the event for the log.
    """
    start, name = time.monotonic(), plan.anatomy.embeddings
    stage = next(s for s, names in zip(plan.stages, plan.targets, strict=True) if name in names)
    assert isinstance(stage, LinearStage)
    weight = source.checkpoint.load([f"{name}.weight"], device)[f"{name}.weight"].float()
    scheme = plan.schemes[name]
    (outcome,) = compress_stack(stage, LinearTask(weight, scheme, None, source.dtype, single_linear(weight, 0.0)))
    compressed = outcome.weight
    assert isinstance(compressed, Quantized)
    table = make_embedding(model.get_submodule(name), name, scheme, source.dtype)
    for leaf, tensor in compressed.to_tensors().items():
        setattr(table, leaf, nn.Parameter(tensor.to(device), requires_grad=False))
    error = float((compressed.decode() - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
    event = {
        "event": "linear",
        "linear": name,
        "method": stage.method,
        "scheme": scheme.name,
        "weight_error": error,
        **outcome.notes,
        "tokens": 0,
        "seconds": round(time.monotonic() - start, 4),
    }
    return table.to(device), event


@contextmanager
def compressed_embeddings(
    model: PreTrainedModel, plan: Plan, source: Source, device: torch.device
) -> Iterator[PreTrainedModel]:
    """Let a model look its embeddings up in the compressed table, while the context lasts.

    Args:
        model: the model, its modules outside the blocks loaded.
        plan: of the walk.
        source: the checkpoint.
        device: where to compute.

    Yields:
        The model.
    """
    if plan.anatomy.embeddings not in plan.schemes:
        yield model
        return
    parent, _, leaf = plan.anatomy.embeddings.rpartition(".")
    owner = model.get_submodule(parent)
    dense = getattr(owner, leaf)
    setattr(owner, leaf, compress_embeddings(model, plan, source, device)[0])
    try:
        yield model
    finally:
        setattr(owner, leaf, dense)
