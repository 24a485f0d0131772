"""Modules outside the blocks and the head (embeddings and norms), loaded only while they are needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from laconic.checkpoint.source import Source
from laconic.structure.anatomy import Anatomy, decoder_name


def materialise_outside(
    model: PreTrainedModel, anatomy: Anatomy, source: Source, device: torch.device, *, embeddings: bool
) -> None:
    """Load the modules outside the blocks and the head.

    Args:
        model: a skeleton.
        anatomy: of the model.
        source: the checkpoint.
        device: where to load them.
        embeddings: whether the token embeddings are loaded too.
    """
    skipped = None if embeddings else model.get_input_embeddings()
    for name, module in _outside(model, anatomy):
        if module is not skipped:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{leaf}" if name else leaf
                tensor = source.checkpoint.load([full])[full].to(device, parameter.dtype)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, leaf, buffer.to(device))


def free_outside(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Move the parameters of the modules outside the blocks and the head to the meta device, which frees them.

    Args:
        model: the model.
        anatomy: of the model.
    """
    for _, module in _outside(model, anatomy):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _outside(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the text part, with what contains it: towers take no part in reading text."""
    decoder = decoder_name(model)
    for name, module in model.named_modules():
        if name == anatomy.head or name == anatomy.blocks or name.startswith(f"{anatomy.blocks}."):
            continue
        if not decoder or f"{name}.".startswith(f"{decoder}.") or f"{decoder}.".startswith(f"{name}." if name else ""):
            yield name, module
