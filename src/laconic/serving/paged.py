"""Attention over pages of packed keys and values, in plain torch: the reference for kernels that read the same bytes.

A page is (heads, tokens, bytes); a cache is pages, and a sequence is a row of page numbers. A token sees itself exactly
and every earlier token as it is stored, so what comes out does not depend on how a text was cut into steps, on what
else is in a batch, or on whether a page was written for another request with the same beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.formats.kv import Static, decode_kv, encode_kv
from laconic.formats.kv_scheme import HeadGroup
from laconic.formats.kv_slot import slot_layout
from laconic.model.places import turn, turn_back
from laconic.solvers.rotate import hadamard

# Scores that are held at once: 128 MiB of float32.
_SCORES = 1 << 25

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of every position, (positions, channels that turn), float32."""


class PackedLayer:
    """How one layer's keys and values become slots, and are read again. static: what calibration fixed, of `keys.G` and
    `values.G`, G the number of the group of heads. angles: where keys are stored before their rotary embedding."""

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        static: Mapping[str, Static],
        *,
        heads: int,
        channels: int,
        dtype: torch.dtype,
        rotated: bool = False,
        angles: Angles | None = None,
    ) -> None:
        self.groups, self.static, self.heads, self.channels, self.dtype = groups, static, heads, channels, dtype
        self.rotated, self.angles = rotated, angles
        self.layouts = [slot_layout(g.keys, g.values, channels, dtype) for g in groups]
        self.nbytes = max(layout.nbytes for layout in self.layouts)
        # A product is the same after both sides were rotated, so that queries can be instead of all that is stored;
        # not where the rotary embedding comes between.
        self.rotates_queries = rotated and angles is None

    def to(self, device: torch.device) -> PackedLayer:
        """With what calibration fixed, and the angles, on a device."""
        static = {name: {n: t.to(device) for n, t in fixed.items()} for name, fixed in self.static.items()}
        angles = None if self.angles is None else (self.angles[0].to(device), self.angles[1].to(device))
        return PackedLayer(
            self.groups,
            static,
            heads=self.heads,
            channels=self.channels,
            dtype=self.dtype,
            rotated=self.rotated,
            angles=angles,
        )

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """keys, values: (tokens, heads, channels) at positions (tokens,) -> slots (tokens, heads, nbytes) uint8."""
        k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        if self.angles is not None:
            k = turn_back(k.float(), *self._at(positions[None]))
        if self.rotated:
            k, v = hadamard(k.float()), hadamard(v.float())
        slots = torch.zeros(len(keys), self.heads, self.nbytes, dtype=torch.uint8, device=keys.device)
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            heads = slice(None) if group.heads is None else list(group.heads)
            packed = layout.pack(
                encode_kv(group.keys, k[:, heads], self.static.get(f"keys.{g}"), self.dtype),
                encode_kv(group.values, v[:, heads], self.static.get(f"values.{g}"), self.dtype),
            )
            slots[:, heads, : layout.nbytes] = packed[0].transpose(0, 1)
        return slots

    def decode(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """slots: (batch, heads, tokens, nbytes), at positions (batch or 1, tokens) -> keys, values, (batch, heads,
        tokens, channels), float32. Both are still rotated where `rotates_queries`, and values where `rotated`."""
        made = []
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            keys, values = layout.unpack(slots if group.heads is None else slots[:, list(group.heads)])
            made.append(
                (
                    decode_kv(group.keys, keys, self.channels, self.static.get(f"keys.{g}")).float(),
                    decode_kv(group.values, values, self.channels, self.static.get(f"values.{g}")).float(),
                )
            )
        k, v = made[0]
        if self.groups[0].heads is not None:
            k, v = (k.new_empty(*slots.shape[:3], self.channels) for _ in range(2))
            for group, (some_k, some_v) in zip(self.groups, made, strict=True):
                k[:, list(group.heads or ())], v[:, list(group.heads or ())] = some_k, some_v
        if self.angles is not None:
            k = turn(hadamard(k) if self.rotated else k, *self._at(positions))
        return k, v

    def _at(self, positions: Tensor) -> Angles:
        assert self.angles is not None
        cos, sin = self.angles
        positions = positions.clamp(max=len(cos) - 1)  # a page may reach beyond the longest text
        return cos[positions][:, None], sin[positions][:, None]


@dataclass(frozen=True)
class Scoring:
    """How scores are made. window: how many tokens a token sees, itself included (None: all). softcap: 0 for none.
    slopes: ALiBi's, (query heads,)."""

    scale: float
    window: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None


def write(layer: PackedLayer, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
    """Store tokens. cache: (pages, heads, tokens a page, bytes). slots: (tokens,), page number times tokens a page,
    plus the token's place in it."""
    page, place = slots // cache.shape[2], slots % cache.shape[2]
    cache[page, :, place, : layer.nbytes] = layer.encode(keys, values, positions)


def attend(
    layer: PackedLayer,
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    longest: int,
    tokens: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
) -> Tensor:
    """The attention of the last n tokens of each sequence of a batch, (batch, n, query heads, channels), float32.

    table: (batch, pages), the pages of each sequence. lengths: (batch,) of the sequences, those n included; longest:
    the largest, or more. tokens: queries (batch, n, query heads, channels), keys, values (batch, n, heads, channels).
    """
    queries, keys, values = (t.float() for t in tokens)
    n, per_page, heads = queries.shape[1], cache.shape[2], layer.heads
    at = lengths[:, None] - n + torch.arange(n, device=lengths.device)
    q = queries.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # (batch, heads, queries a head, n, channels)
    k, v = (t.permute(0, 2, 1, 3) for t in (keys, values))
    slopes = None if scoring.slopes is None else scoring.slopes.view(1, heads, -1, 1, 1)
    # A token begins with itself; the softmax then takes in what is stored piece by piece, and memory stays bounded.
    top = _capped(torch.einsum("bhgnd,bhnd->bhgn", q, k) * scoring.scale, scoring.softcap)[..., None]
    total = torch.ones_like(top)
    out = (hadamard(v) if layer.rotated else v)[:, :, None].expand_as(q).clone()
    if layer.rotates_queries:
        q = hadamard(q)
    pages = -(-longest // per_page)
    first = 0
    if scoring.window is not None:
        first = max(0, int(lengths.min()) - n + 1 - scoring.window) // per_page
    step = max(1, _SCORES // (queries.numel() // queries.shape[-1] * per_page))
    for start in range(first, pages, step):
        numbers = table[:, start : min(start + step, pages)]
        there = start * per_page + torch.arange(numbers.shape[1] * per_page, device=table.device)
        slots = cache[numbers.long()].transpose(1, 2).flatten(2, 3)
        # What lies behind a sequence's end is of others, or of nobody, and may be no numbers at all.
        slots = slots.masked_fill((there >= lengths[:, None])[:, None, :, None], 0)
        some_k, some_v = layer.decode(slots, there[None])
        scores = _capped(torch.einsum("bhgnd,bhtd->bhgnt", q, some_k) * scoring.scale, scoring.softcap)
        if slopes is not None:
            scores += slopes * (there - at[:, :, None])[:, None, None]
        seen = there < at[:, :, None]
        if scoring.window is not None:
            seen &= there > at[:, :, None] - scoring.window
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        shares, kept = torch.exp(scores - now), torch.exp(top - now)
        total = total * kept + shares.sum(-1, keepdim=True)
        out = out * kept + torch.einsum("bhgnt,bhtd->bhgnd", shares, some_v)
        top = now
    out = out / total
    if layer.rotated:
        out = hadamard(out)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _capped(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores
