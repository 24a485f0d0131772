"""Attention over pages of packed keys and values, in plain torch, or by a kernel that reads the same bytes.

A page is (heads, tokens, bytes); a cache is pages, and a sequence is a row of page numbers. A token sees itself exactly
and every earlier token as it is stored, so what comes out does not depend on how a text was cut into steps, on what
else is in a batch, or on whether a page was written for another request with the same beginning.

Behind the slots of a page, a few bytes in each of its rows, is its tail: the exact first tokens of a text, ranges that
tokens share, and the exact tokens that still wait for the rest of their unit (`serving.paged_units`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laconic.kv.attention import runs_on
from laconic.kv.format import KvFormat, Static, decode_kv, encode_kv
from laconic.kv.positions import turn, turn_back
from laconic.kv.scheme import HeadGroup, tokens_at_once
from laconic.serving.slot import SlotLayout, slot_layout
from laconic.solvers.rotate import Turns, turned

if TYPE_CHECKING:
    from laconic.serving.paged_units import Units

# Scores, or numbers of decoded keys and values, that are held at once: 128 MiB of float32.
_HELD = 1 << 25

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of every position, (positions, channels that turn), float32."""


@dataclass(frozen=True)
class PackedLayer:
    """How one layer's keys and values become pages, and are read again. static: what calibration fixed, of `keys.G` and
    `values.G`, G the number of the group of heads. angles: where keys are stored before their rotary embedding. sinks:
    how many of a text's first tokens are exact. per_page: tokens a page, where it has a tail."""

    groups: Sequence[HeadGroup]
    static: Mapping[str, Static]
    heads: int
    channels: int
    dtype: torch.dtype
    turns: Turns | None = None
    angles: Angles | None = None
    sinks: int = 0
    per_page: int | None = None

    def to(self, device: torch.device) -> PackedLayer:
        """With what calibration fixed, and the angles, on a device."""
        static = {name: {n: t.to(device) for n, t in fixed.items()} for name, fixed in self.static.items()}
        angles = None if self.angles is None else (self.angles[0].to(device), self.angles[1].to(device))
        turns = None if self.turns is None else (self.turns[0].to(device), self.turns[1].to(device))
        return replace(self, static=static, angles=angles, turns=turns)

    @cached_property
    def unit(self) -> int:
        """How many tokens are stored together."""
        return tokens_at_once(self.groups)

    @cached_property
    def layouts(self) -> list[SlotLayout]:
        """Of each group of heads."""
        return [slot_layout(g, self.channels, self.dtype, self.unit) for g in self.groups]

    @cached_property
    def slot(self) -> int:
        """Bytes of a slot."""
        return max(layout.nbytes for layout in self.layouts)

    @cached_property
    def shared(self) -> int:
        """Bytes that a unit's tokens share."""
        return max(layout.shared_nbytes for layout in self.layouts)

    @cached_property
    def exact(self) -> int:
        """Bytes of a token that is kept as it is."""
        return 2 * self.channels * torch.empty(0, dtype=self.dtype).element_size()

    @cached_property
    def tail(self) -> int:
        """Bytes of a page's tail, for each head: sinks, what units share, the unit that waits."""
        if self.per_page is None:
            return 0
        waiting = self.unit * self.exact if self.unit > 1 else 0
        return self.sinks * self.exact + self.per_page // self.unit * self.shared + waiting

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a row of a page: a slot, and its part of the tail; even, so that ranges are read as they lie.

        Raises: ValueError when pages are too small, or of no whole number of units.
        """
        if self.per_page is None:
            assert self.unit == 1
            assert not self.sinks
            return self.slot
        if self.per_page % self.unit or self.sinks > self.per_page:
            raise ValueError(
                f"pages of {self.per_page} tokens hold no whole units of {self.unit}, or not {self.sinks} exact first "
                f"tokens; serve with --block-size {-(-max(self.per_page, self.sinks) // self.unit) * self.unit}"
            )
        return (self.slot + -(-self.tail // self.per_page) + 1) // 2 * 2

    @property
    def rotates_queries(self) -> bool:
        """Whether queries are rotated instead of all that is stored, since a product is the same after both sides were;
        not where the rotary embedding comes between."""
        return self.turns is not None and self.angles is None

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (batch, heads, tokens, channels) at positions (batch, tokens) -> slots (batch, heads, tokens,
        bytes) and what they share (batch, heads, units, bytes), uint8."""
        if self.angles is not None:
            keys = turn_back(keys.float(), *self._at(positions))
        if self.turns:
            keys, values = turned(keys.float(), self.turns[0]), turned(values.float(), self.turns[1])
        lead, tokens = keys.shape[:2], keys.shape[2]
        slots = torch.zeros(*lead, tokens, self.slot, dtype=torch.uint8, device=keys.device)
        shared = torch.zeros(*lead, tokens // self.unit, self.shared, dtype=torch.uint8, device=keys.device)
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            heads = slice(None) if group.heads is None else list(group.heads)
            slots[:, heads, :, : layout.nbytes], shared[:, heads, :, : layout.shared_nbytes] = layout.pack(
                encode_kv(group.keys, keys[:, heads], self.static.get(f"keys.{g}"), self.dtype),
                encode_kv(group.values, values[:, heads], self.static.get(f"values.{g}"), self.dtype),
            )
        return slots, shared

    def decode(self, slots: Tensor, shared: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` gave, at positions (batch or 1, tokens) -> keys, values, (batch, heads, tokens, channels),
        float32; keys still rotated where `rotates_queries`, and values where there are `turns`."""
        made = []
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            heads = slice(None) if group.heads is None else list(group.heads)
            keys, values = layout.unpack(slots[:, heads], shared[:, heads])
            k = decode_kv(group.keys, keys, self.channels, self.static.get(f"keys.{g}"))
            v = decode_kv(group.values, values, self.channels, self.static.get(f"values.{g}"))
            made.append((k.float(), v.float()))
        k, v = made[0]
        if self.groups[0].heads is not None:
            k, v = (k.new_empty(*slots.shape[:3], self.channels) for _ in range(2))
            for group, (some_k, some_v) in zip(self.groups, made, strict=True):
                k[:, list(group.heads or ())], v[:, list(group.heads or ())] = some_k, some_v
        if self.angles is not None:
            k = turn(turned(k, self.turns[0].mT) if self.turns else k, *self._at(positions))
        return k, v

    def _at(self, positions: Tensor) -> Angles:
        assert self.angles is not None
        cos, sin = self.angles
        positions = positions.clamp(max=len(cos) - 1)  # a page may reach beyond the longest text
        return cos[positions][:, None], sin[positions][:, None]


@dataclass(frozen=True)
class Part:
    """Sequences of one step with as many new tokens each. table: (sequences, pages). lengths: (sequences,), the new
    tokens included; longest: the largest, or more. tokens: (sequences, new tokens), which of the step's they are."""

    table: Tensor
    lengths: Tensor
    longest: int
    tokens: Tensor

    @property
    def positions(self) -> Tensor:
        """(sequences, new tokens)."""
        n = self.tokens.shape[1]
        return self.lengths.long()[:, None] - n + torch.arange(n, device=self.lengths.device)


@dataclass(frozen=True)
class Scoring:
    """How scores are made. window: how many tokens a token sees, itself included (None: all). softcap: 0 for none.
    slopes: ALiBi's, (query heads,)."""

    scale: float
    window: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None


def write(layer: PackedLayer, cache: Tensor, part: Part, keys: Tensor, values: Tensor) -> None:
    """Store the new tokens of a part, (sequences, new tokens, heads, channels), where each is stored for itself. cache:
    (pages, heads, tokens a page, bytes)."""
    at = part.positions
    page, place = part.table.gather(1, at // cache.shape[2]).long(), at % cache.shape[2]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    cache[page, :, place, : layer.slot] = layer.encode(k, v, at)[0].transpose(1, 2)
    write_sinks(layer, cache, part, k, v)


def write_sinks(layer: PackedLayer, cache: Tensor, part: Part, keys: Tensor, values: Tensor) -> None:
    """Keep the first tokens of a text as they are, in its first page. keys, values: (sequences, heads, ...)."""
    if not layer.sinks:
        return
    which, new = (part.positions < layer.sinks).nonzero(as_tuple=True)
    kept = exactly(layer, keys, values)[which, :, new]
    put_tail(layer, cache, part.table[which, 0], part.positions[which, new] * layer.exact, kept)


def exactly(layer: PackedLayer, keys: Tensor, values: Tensor) -> Tensor:
    """keys, values: (..., channels) -> bytes (..., exact)."""
    return torch.cat([keys, values], -1).to(layer.dtype).contiguous().view(torch.uint8)


def from_exactly(layer: PackedLayer, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `exactly`, in float32."""
    keys, values = kept.contiguous().view(layer.dtype).float().chunk(2, -1)
    return keys, values


def put_tail(layer: PackedLayer, cache: Tensor, pages: Tensor, starts: Tensor, kept: Tensor) -> None:
    """Write into tails of pages (n,), from bytes starts (n,) on, kept (n, heads, bytes)."""
    width = layer.nbytes - layer.slot
    at = starts[:, None] + torch.arange(kept.shape[2], device=starts.device)
    cache[pages.long()[:, None], :, at // width, layer.slot + at % width] = kept.transpose(1, 2)


def attend(
    layer: PackedLayer,
    cache: Tensor,
    part: Part,
    tokens: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    units: Units | None = None,
) -> Tensor:
    """The attention of a part's new tokens, (sequences, new tokens, query heads, channels), float32.

    tokens: queries (sequences, new tokens, query heads, channels), and keys and values, with their heads. units: where
    tokens are stored several at a time, those that the new tokens are in: a token sees its own unit exactly.
    """
    queries, keys, values = (t.float() for t in tokens)
    per_page, heads, at = cache.shape[2], layer.heads, part.positions
    q = queries.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # (sequences, heads, queries a head, n, channels)
    k, v = (t.permute(0, 2, 1, 3) for t in (keys, values))
    slopes = None if scoring.slopes is None else scoring.slopes.view(1, heads, -1, 1, 1)
    # A token begins with itself; the softmax then takes in the others piece by piece, and memory stays bounded.
    top = _capped(torch.einsum("bhgnd,bhnd->bhgn", q, k) * scoring.scale, scoring.softcap)[..., None]
    total = torch.ones_like(top)
    out = v[:, :, None].expand_as(q)

    def take(scores: Tensor, distance: Tensor, seen: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """scores: (sequences, heads, queries a head, n, others); distance, seen: (sequences, n, others)."""
        nonlocal top, total, out
        scores = _capped(scores * scoring.scale, scoring.softcap)
        if slopes is not None:
            scores = scores - slopes * distance[:, None, None]
        if scoring.window is not None:
            seen = seen & (distance < scoring.window)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        shares, kept = torch.exp(scores - now), torch.exp(top - now)
        total, top = total * kept + shares.sum(-1, keepdim=True), now
        out = out * kept + product(shares)

    first_of_unit = at // layer.unit * layer.unit
    if units is not None:
        distance = (at - first_of_unit)[:, :, None] - torch.arange(layer.unit, device=at.device)
        near = units.gather(torch.einsum("bhgmqd,bhmud->bhgmqu", units.spread(q), units.keys))

        def of_units(shares: Tensor) -> Tensor:
            assert units is not None
            return units.gather(torch.einsum("bhgmqu,bhmud->bhgmqd", units.spread(shares), units.values))

        take(near, distance, distance > 0, of_units)
    if layer.turns:
        out = turned(out, layer.turns[1])
        q = turned(q, layer.turns[0]) if layer.rotates_queries else q
    if kernel_reads(layer, scoring, cache):
        if layer.sinks:
            there, some_k, some_v = _sinks(layer, cache, part)
            seen = (there < first_of_unit[:, :, None]).expand(-1, -1, layer.sinks)
            scores = torch.einsum("bhgnd,bhtd->bhgnt", q, some_k)
            take(scores, at[:, :, None] - there, seen, partial(torch.einsum, "bhtd,bhgnt->bhgnd", some_v))
        made, weight = _history(layer, cache, part, q, scoring)
        now = torch.maximum(top, weight)
        kept, share = torch.exp(top - now), torch.exp(weight - now)
        out = (out * kept + made * share) / (total * kept + share)
        return _laid_out(layer, out)
    first = 0
    if scoring.window is not None:
        first = max(0, int(at[:, 0].min()) + 1 - scoring.window) // per_page
    a_token = max(queries[:, :, :, 0].numel(), 2 * keys[:, 0].numel())
    step = max(1, _HELD // (a_token * per_page))
    for start in range(first, -(-part.longest // per_page), step):
        numbers = part.table[:, start : start + step][:, : -(-part.longest // per_page) - start]
        there, some_k, some_v = _read(layer, cache, numbers, part.lengths, start * per_page)
        seen, distance = there < first_of_unit[:, :, None], at[:, :, None] - there
        scores = torch.einsum("bhgnd,bhtd->bhgnt", q, some_k)
        take(scores, distance, seen, partial(torch.einsum, "bhtd,bhgnt->bhgnd", some_v))
    return _laid_out(layer, out / total)


def _laid_out(layer: PackedLayer, out: Tensor) -> Tensor:
    """Sums of stored values (sequences, heads, queries a head, new tokens, channels) as attention puts them out."""
    out = turned(out, layer.turns[1].mT) if layer.turns else out
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def kernel_reads(layer: PackedLayer, scoring: Scoring, cache: Tensor) -> bool:
    """Whether the kernel reads a layer's pages: there is Triton and a GPU (or its interpreter), all heads are stored
    alike, in whole codes with ranges of their own, keys after their rotary embedding; no softcap, no slopes."""
    if not runs_on(cache.device) or len(layer.groups) > 1 or layer.angles is not None:
        return False
    if any(n % 2 for n in (*cache.stride()[:3], cache.data_ptr(), layer.slot, layer.nbytes)):
        return False
    if scoring.softcap or scoring.slopes is not None:
        return False
    from laconic.serving.paged_triton import fits_pages

    return all(fits_pages(fmt, layer.channels) for fmt in (layer.groups[0].keys, layer.groups[0].values))


def _history(layer: PackedLayer, cache: Tensor, part: Part, q: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """By the kernel: `paged_history` of what `layer` says of its pages."""
    from laconic.serving.paged_triton import Side, paged_history

    layout, group = layer.layouts[0], layer.groups[0]

    def side(of: str, fmt: KvFormat) -> Side:
        found = {f.name: f.start for f in (*layout.fields, *layout.shared) if f.of == of}
        return Side(fmt, found["codes"], found["scale"], found.get("offset", -1))

    return paged_history(
        q,
        cache,
        part.table,
        part.lengths,
        part.longest,
        side("keys", group.keys),
        side("values", group.values),
        scale=scoring.scale,
        slot=layer.slot,
        width=layer.nbytes - layer.slot,
        shared_at=layer.sinks * layer.exact,
        shared=layer.shared,
        unit=layer.unit,
        sinks=layer.sinks,
        window=scoring.window,
    )


def _sinks(layer: PackedLayer, cache: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """As `_read`, of the exact first tokens alone."""
    there = torch.arange(layer.sinks, device=cache.device)
    tails = cache[part.table[:, 0].long()][..., layer.slot : layer.nbytes].flatten(2)
    kept = tails[..., : layer.sinks * layer.exact].unflatten(2, (layer.sinks, layer.exact))
    missing = (there >= (part.lengths // layer.unit * layer.unit)[:, None])[:, None, :, None]
    keys, values = from_exactly(layer, kept.masked_fill(missing, 0))
    return there, *_as_stored(layer, keys, values)


def _read(
    layer: PackedLayer, cache: Tensor, numbers: Tensor, lengths: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of the pages of these numbers, (tokens,), from `start` on, and the keys and values there."""
    per_page = cache.shape[2]
    there = start + torch.arange(numbers.shape[1] * per_page, device=cache.device)
    rows = cache[numbers.long()].transpose(1, 2)  # (sequences, heads, pages, tokens a page, bytes)
    slots, tails = rows[..., : layer.slot].flatten(2, 3), rows[..., layer.slot : layer.nbytes].flatten(3)
    begin = layer.sinks * layer.exact
    shared = tails[..., begin : begin + per_page // layer.unit * layer.shared]
    shared = shared.unflatten(3, (per_page // layer.unit, layer.shared)).flatten(2, 3)
    # What is not stored yet is of others, or of nobody, and may be no numbers at all.
    missing = (there >= (lengths // layer.unit * layer.unit)[:, None])[:, None, :, None]
    slots = slots.masked_fill(missing, 0)
    shared = shared.masked_fill(missing[:, :, :: layer.unit], 0)
    keys, values = layer.decode(slots, shared, there[None])
    if layer.sinks and start == 0:
        kept = tails[:, :, 0, :begin].unflatten(2, (layer.sinks, layer.exact))
        kept = kept.masked_fill(missing[:, :, : layer.sinks], 0)
        some_k, some_v = from_exactly(layer, kept)
        keys[:, :, : layer.sinks], values[:, :, : layer.sinks] = _as_stored(layer, some_k, some_v)
    return there, keys, values


def _as_stored(layer: PackedLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Exact keys and values, rotated as `decode` leaves the others."""
    if layer.turns is None:
        return keys, values
    return turned(keys, layer.turns[0]) if layer.rotates_queries else keys, turned(values, layer.turns[1])


def _capped(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores
