"""Rotary position embeddings of keys: applying them, removing them, and finding that of a model.

Channels are rotated in pairs, the first half of those that take part against the second half.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.anatomy import decoder_of


@dataclass(frozen=True)
class RotaryEmbedding:
    """A model's rotary embedding.

    Attributes:
        module: `module(x, position_ids) -> cos, sin`.
        layer_types: Type of each layer, where the embedding differs by type.
    """

    module: nn.Module
    layer_types: Sequence[str] | None = None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of a tensor, as many as there are angles; the others stay as they are.

    Args:
        x: (..., tokens, channels).
        cos: Cosines, (..., tokens, channels that rotate), broadcasting over x.
        sin: Sines, in the shape of the cosines.

    Returns:
        A new tensor of the shape of x.
    """
    n = cos.shape[-1]
    first, rest = x[..., :n], x[..., n:]
    return torch.cat([first * cos + _rotate_half(first) * sin, rest], -1)


def remove_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Invert `apply_rotary`, also where the embedding scales by a factor.

    Args:
        x: (..., tokens, channels).
        cos: Cosines, (..., tokens, channels that rotate), broadcasting over x.
        sin: Sines, in the shape of the cosines.

    Returns:
        A new tensor of the shape of x.
    """
    n = cos.shape[-1]
    first, rest = x[..., :n], x[..., n:]
    first = (first * cos - _rotate_half(first) * sin) / (cos.square() + sin.square())
    return torch.cat([first, rest], -1)


def rotary_of(model: PreTrainedModel) -> RotaryEmbedding:
    """Return a model's rotary embedding.

    Args:
        model: The model.

    Raises:
        ValueError: The model has none, or one that cannot be removed from keys and applied again.
    """
    decoder = decoder_of(model)
    module = getattr(decoder, "rotary_emb", None)
    if not isinstance(module, nn.Module) or not _rotates_halves(decoder):
        raise ValueError(
            f"keys are to be stored before their rotary embedding, and that of '{model.config.model_type}' is not "
            "known; set before_rope: false"
        )
    rope_types = getattr(module, "rope_type", "default")
    if {"dynamic", "longrope"} & set(rope_types.values() if isinstance(rope_types, dict) else [rope_types]):
        raise ValueError("this model's rotary embedding changes with the length of the text; set before_rope: false")
    by_layer = "layer_type" in inspect.signature(type(module).forward).parameters
    return RotaryEmbedding(module, model.config.get_text_config().layer_types if by_layer else None)


def _rotates_halves(decoder: nn.Module) -> bool:
    """Return whether the model rotates the first half of channels against the second, as `apply_rotary` does."""
    model_function = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if model_function is None:
        return False
    x = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        rotated = model_function(x, x, cos, sin)[1]
    except Exception:
        return False
    return torch.allclose(rotated, x * cos[:, None] + _rotate_half(x) * sin[:, None], atol=1e-5)


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
