"""Where the tokens in a cache are: their positions, and how many padding tokens lead each row.

A cache is given keys with their rotary embedding on, and nothing of positions. A hook on the model (`kv.open`)
tells of them at the beginning of each forward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Places:
    """rotary: the model's rotary embedding, `rotary(x, position_ids) -> cos, sin`. layer_types: of each layer, where
    the model has a rotary embedding for each.

    padding: how many slots lead each row that are none of its tokens, (rows,); None where none do. only_padding:
    whether the pass that has begun hides these and nothing else."""

    def __init__(self, rotary: nn.Module | None = None, layer_types: Sequence[str] | None = None) -> None:
        self.rotary, self.layer_types = rotary, layer_types
        self.positions: Tensor | None = None
        self.padding: Tensor | None = None
        self.only_padding = False
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.nbytes for t in (self.positions, self.padding) if t is not None)

    def begin(self, seen: int, tokens: int, positions: Tensor | None, mask: Tensor | None) -> None:
        """A forward pass of so many tokens begins, after those seen. positions: (rows or 1, tokens). mask: (rows, seen
        + tokens), zero for padding."""
        # A new text forgets the padding of the one before, whose own is told right below.
        self.cut(seen)
        self._known.clear()
        # While only padding was seen, more of it may follow.
        plain = mask is None or mask.dim() == 2
        if mask is not None and plain and not mask.all():
            hidden = (mask == 0).long()
            self.padding = hidden.cumprod(-1).sum(-1)
            self.only_padding = bool((hidden.sum(-1) == self.padding).all())
        else:
            self.only_padding = plain and self.padding is None
        if self.rotary is None:
            return
        if positions is None:
            positions = torch.arange(seen, seen + tokens)[None]
        new = positions.to(torch.int32)
        if self.positions is None:
            self.positions = new
        else:
            rows = max(len(self.positions), len(new))
            self.positions = torch.cat([p.to(new.device).expand(rows, -1) for p in (self.positions, new)], 1)

    def cut(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        if tokens == 0:
            self.positions = self.padding = None
        elif self.positions is not None:
            self.positions = self.positions[:, :tokens]

    def select(self, rows: Tensor) -> None:
        """Take these rows."""
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows.to(self.positions.device)]
        if self.padding is not None:
            self.padding = self.padding[rows.to(self.padding.device)]
        self._known.clear()

    def repeat(self, times: int) -> None:
        """Every row so many times."""
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.repeat_interleave(times, 0)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(times, 0)
        self._known.clear()

    def starts(self, rows: int, device: torch.device) -> Tensor:
        """The slot of every row's first token, (rows,)."""
        return torch.zeros(rows, dtype=torch.long, device=device) if self.padding is None else self.padding.to(device)

    def rotate(self, keys: Tensor, start: int, layer: int) -> Tensor:
        """Put the rotary embedding on keys (rows, heads, tokens, channels) of the slots from `start` on."""
        return turn(keys, *self._angles(keys, start, layer))

    def unrotate(self, keys: Tensor, start: int, layer: int) -> Tensor:
        """The inverse of `rotate`, whatever factor the embedding scales by."""
        return turn_back(keys, *self._angles(keys, start, layer))

    def angles(self, start: int, tokens: int, device: torch.device, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of so many slots from `start` on, of the first half of the channels that turn, whose
        second half has the same: (rows or 1, tokens, channels / 2), float16."""
        name = ("half", self.layer_types[layer] if self.layer_types else None, start, tokens)
        if name not in self._known:
            cos, sin = self._angles(torch.empty(1, 1, tokens, 0, device=device), start, layer)
            n = cos.shape[-1] // 2
            self._known[name] = (cos[:, 0, :, :n].half().contiguous(), sin[:, 0, :, :n].half().contiguous())
        return self._known[name]

    def _angles(self, keys: Tensor, start: int, layer: int) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        if self.positions is None:
            raise ValueError(
                "this cache was not told where tokens are, so it was made for another model; make one for each, by "
                "laconic.kv_cache"
            )
        stop = start + keys.shape[2]
        kind = self.layer_types[layer] if self.layer_types else None
        if (kind, start, stop) not in self._known:
            positions = self.positions[:, start:stop].long().to(keys.device)
            more = {} if kind is None else {"layer_type": kind}
            cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=keys.device), positions, **more)
            self._known[kind, start, stop] = (cos.float()[:, None], sin.float()[:, None])
        return self._known[kind, start, stop]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first channels, as many as there are angles, the first half of them against the second."""
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    return torch.cat([turned * cos + _half_turn(turned) * sin, rest], -1)


def turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `turn`, whatever factor the angles scale by."""
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    turned = (turned * cos - _half_turn(turned) * sin) / (cos.square() + sin.square())
    return torch.cat([turned, rest], -1)


def places_of(model: PreTrainedModel, *, rotary: bool) -> Places:
    """Places for a cache of a model. rotary: whether keys are to be freed of their rotary embedding.

    Raises: ValueError when that was asked for of a model that has none, or one of another kind.
    """
    if not rotary:
        return Places()
    decoder = model.get_decoder()
    embedding = getattr(decoder, "rotary_emb", None)
    if not isinstance(embedding, nn.Module) or not _turns_by_halves(decoder):
        raise ValueError(
            f"keys are to be stored before their rotary embedding, and that of '{model.config.model_type}' is not "
            "known; set before_rope: false"
        )
    kinds = getattr(embedding, "rope_type", "default")
    if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        raise ValueError("this model's rotary embedding changes with the length of the text; set before_rope: false")
    by_layer = "layer_type" in inspect.signature(type(embedding).forward).parameters
    return Places(embedding, model.config.get_text_config().layer_types if by_layer else None)


def _turns_by_halves(decoder: nn.Module) -> bool:
    """Whether the model's own function turns the first half of channels against the second, as `Places.rotate` does."""
    own = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if own is None:
        return False
    x = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        found = own(x, x, cos, sin)[1]
    except Exception:
        return False
    return torch.allclose(found, x * cos[:, None] + _half_turn(x) * sin[:, None], atol=1e-5)


def _half_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
