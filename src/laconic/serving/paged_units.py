"""Pages whose tokens are stored a unit at a time, as where neighbouring tokens share a channel's range.

Tokens of a unit that is not complete wait, exact, in the tail of the page that they will be stored in, and are written
over by those of the page's next unit. Nothing is kept for a request outside of its own pages; and a page that is full
waits for nothing, so it can be shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.serving.paged import PackedLayer, Part, exactly, from_exactly, put_tail, write_sinks


@dataclass(frozen=True)
class Units:
    """Exact keys and values of the units that a part's new tokens are in, (sequences, heads, units, unit, channels),
    those before them in the first unit included; and where in these each new token is, (sequences, new tokens)."""

    keys: Tensor
    values: Tensor
    at: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """What new tokens have, (sequences, heads, queries a head, new tokens, n) -> (..., units, unit, n)."""
        shape = (*x.shape[:3], self.keys.shape[2] * self.keys.shape[3], x.shape[4])
        spread = x.new_zeros(shape).scatter(3, self._index(x), x)
        return spread.view(*shape[:3], self.keys.shape[2], self.keys.shape[3], shape[4])

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        x = x.flatten(3, 4)
        return x.gather(3, self._index(x))

    def _index(self, x: Tensor) -> Tensor:
        return self.at[:, None, None, :, None].expand(*x.shape[:3], -1, x.shape[4])


def write_units(layer: PackedLayer, cache: Tensor, part: Part, keys: Tensor, values: Tensor) -> Units:
    """Store the units that a part's new tokens complete, (sequences, new tokens, heads, channels), and let the rest
    wait."""
    unit, per_page = layer.unit, cache.shape[2]
    begin = part.positions[:, 0]
    ahead, first, length = begin % unit, begin // unit, part.lengths.long()
    units = _gathered(layer, cache, part, keys, values, ahead)
    shared_at = layer.sinks * layer.exact
    whole = (first[:, None] + torch.arange(units.keys.shape[2], device=cache.device) + 1) * unit <= length[:, None]
    b, m = whole.nonzero(as_tuple=True)
    if len(b):
        at = ((first[b] + m) * unit)[:, None] + torch.arange(unit, device=cache.device)
        slots, shared = layer.encode(units.keys[b, :, m], units.values[b, :, m], at)
        page, place = part.table[b, at[:, 0] // per_page].long(), at % per_page
        cache[page[:, None], :, place, : layer.slot] = slots.transpose(1, 2)
        put_tail(layer, cache, page, shared_at + place[:, 0] // unit * layer.shared, shared[:, :, 0])
    b = (length % unit).nonzero()[:, 0]
    if len(b):
        last = length[b] // unit
        page = part.table[b, last * unit // per_page]
        waiting = exactly(layer, *(x[b, :, last - first[b]] for x in (units.keys, units.values)))
        start = shared_at + per_page // unit * layer.shared
        put_tail(layer, cache, page, torch.full_like(b, start), waiting.flatten(2))
    write_sinks(layer, cache, part, keys.transpose(1, 2), values.transpose(1, 2))
    return units


def _gathered(layer: PackedLayer, cache: Tensor, part: Part, keys: Tensor, values: Tensor, ahead: Tensor) -> Units:
    """The new tokens in their units. ahead: (sequences,), how many waited in the first."""
    unit, n = layer.unit, keys.shape[1]
    count = (unit - 1 + n + unit - 1) // unit
    page = part.table.gather(1, part.positions[:, :1] // unit * unit // cache.shape[2])[:, 0].long()
    start = layer.sinks * layer.exact + cache.shape[2] // unit * layer.shared
    tails = cache[page][..., layer.slot : layer.nbytes].flatten(2)
    waiting = tails[..., start : start + unit * layer.exact].unflatten(2, (unit, layer.exact))
    place = torch.arange(count * unit, device=cache.device) - ahead[:, None]
    is_new = ((place >= 0) & (place < n))[:, None, :, None]
    found = []
    for new, old in zip((keys, values), from_exactly(layer, waiting), strict=True):
        x = new.float().transpose(1, 2)
        index = place.clamp(0, n - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        x = x.gather(2, index).masked_fill(~is_new, 0)
        x[:, :, :unit] = torch.where((place[:, :unit] < 0)[:, None, :, None], old, x[:, :, :unit])
        found.append(x.unflatten(2, (count, unit)))
    return Units(found[0], found[1], ahead[:, None] + torch.arange(n, device=cache.device))
