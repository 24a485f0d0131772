"""Writing new tokens into pages.

Where neighbouring tokens share a channel's range, tokens are stored a unit at a time. Tokens of an incomplete unit
wait, exact, in the tail of the page that they will be stored in, and the tokens of the page's next unit overwrite them.
Nothing of a request is kept outside of its own pages; and a full page has no waiting tokens, so it can be shared.

Axes: B sequences, H key-value heads, R query heads that share one, N new tokens, U units, M tokens of a unit, C
channels, X bytes. A cache is (pages, H, tokens of a page, X).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.serving.page import PagedLayer, SequenceBatch


@dataclass(frozen=True)
class UnitTokens:
    """Exact keys and values of the units that the new tokens are in, earlier tokens of the first unit included.

    Attributes:
        keys_BHUMC: (B, H, U, M, C) keys, float32.
        values_BHUMC: (B, H, U, M, C) values, float32.
        index_BN: (B, N) index of each new token in these, counted along U M.
    """

    keys_BHUMC: Tensor
    values_BHUMC: Tensor
    index_BN: Tensor

    def scatter(self, x: Tensor) -> Tensor:
        """Move values of the new tokens to their places in the units; other places are 0.

        Args:
            x: (B, H, R, N, n) values of the new tokens.

        Returns:
            (B, H, R, U, M, n) of the same dtype.
        """
        units, unit = self.keys_BHUMC.shape[2:4]
        shape = (*x.shape[:3], units * unit, x.shape[4])
        scattered = x.new_zeros(shape).scatter(3, self._index(x), x)
        return scattered.view(*shape[:3], units, unit, shape[4])

    def gather(self, x: Tensor) -> Tensor:
        """Invert `scatter`.

        Args:
            x: (B, H, R, U, M, n) values of all places of the units.

        Returns:
            (B, H, R, N, n) values of the new tokens.
        """
        x = x.flatten(3, 4)
        return x.gather(3, self._index(x))

    def _index(self, x: Tensor) -> Tensor:
        return self.index_BN[:, None, None, :, None].expand(*x.shape[:3], -1, x.shape[4])


def write_tokens(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> None:
    """Store new tokens, where each is encoded by itself.

    Args:
        layer: Layout of the pages.
        cache: Pages, (pages, H, tokens of a page, X) uint8; written to.
        batch: The sequences.
        keys_BNHC: (B, N, H, C) keys of their new tokens.
        values_BNHC: (B, N, H, C) values of their new tokens.
    """
    positions_BN = batch.positions_BN
    page_tokens = cache.shape[2]
    page_BN = batch.table_BP.gather(1, positions_BN // page_tokens).long()
    keys_BHNC, values_BHNC = keys_BNHC.transpose(1, 2), values_BNHC.transpose(1, 2)
    slots_BHNX, _ = layer.encode(keys_BHNC, values_BHNC, positions_BN)
    cache[page_BN, :, positions_BN % page_tokens, : layer.slot_bytes] = slots_BHNX.transpose(1, 2)
    _write_sinks(layer, cache, batch, keys_BHNC, values_BHNC)


def write_units(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> UnitTokens:
    """Store the units that new tokens complete, and keep the tokens of the last unit exact if it is incomplete.

    Args:
        layer: Layout of the pages.
        cache: Pages, (pages, H, tokens of a page, X) uint8; written to.
        batch: The sequences.
        keys_BNHC: (B, N, H, C) keys of their new tokens.
        values_BNHC: (B, N, H, C) values of their new tokens.

    Returns:
        The units, for attention: a token attends to its own unit exactly.
    """
    unit, page_tokens = layer.unit, cache.shape[2]
    begin_B, length_B = batch.positions_BN[:, 0], batch.lengths_B.long()
    first_unit_B = begin_B // unit
    units = _gather_units(layer, cache, batch, keys_BNHC, values_BNHC)
    unit_BU = first_unit_B[:, None] + torch.arange(units.keys_BHUMC.shape[2], device=cache.device)
    b, u = ((unit_BU + 1) * unit <= length_B[:, None]).nonzero(as_tuple=True)
    if len(b):
        positions = ((first_unit_B[b] + u) * unit)[:, None] + torch.arange(unit, device=cache.device)
        slots, shared = layer.encode(units.keys_BHUMC[b, :, u], units.values_BHUMC[b, :, u], positions)
        page, row = batch.table_BP[b, positions[:, 0] // page_tokens].long(), positions % page_tokens
        cache[page[:, None], :, row, : layer.slot_bytes] = slots.transpose(1, 2)
        start = layer.shared_at + row[:, 0] // unit * layer.shared_bytes
        _write_tail(layer, cache, page, start, shared[:, :, 0])
    b = (length_B % unit).nonzero()[:, 0]
    if len(b):
        last = length_B[b] // unit
        page = batch.table_BP[b, last * unit // page_tokens]
        u = last - first_unit_B[b]
        waiting = layer.to_exact(units.keys_BHUMC[b, :, u], units.values_BHUMC[b, :, u])
        waiting_at = layer.shared_at + page_tokens // unit * layer.shared_bytes
        _write_tail(layer, cache, page, torch.full_like(b, waiting_at), waiting.flatten(2))
    _write_sinks(layer, cache, batch, keys_BNHC.transpose(1, 2), values_BNHC.transpose(1, 2))
    return units


def _gather_units(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> UnitTokens:
    """Put new tokens into their units, behind the tokens that wait in the first unit."""
    unit, n, page_tokens = layer.unit, keys_BNHC.shape[1], cache.shape[2]
    begin_B = batch.positions_BN[:, 0]
    waiting_B = begin_B % unit
    count = (unit - 1 + n + unit - 1) // unit
    page_B = batch.table_BP.gather(1, (begin_B // unit * unit // page_tokens)[:, None])[:, 0].long()
    start = layer.shared_at + page_tokens // unit * layer.shared_bytes
    tails_BHX = cache[page_B][..., layer.slot_bytes : layer.row_bytes].flatten(2)
    waiting_BHMX = tails_BHX[..., start : start + unit * layer.exact_bytes].unflatten(2, (unit, layer.exact_bytes))
    # Number of the new token at each place of the units; of a waiting token it is negative.
    token = torch.arange(count * unit, device=cache.device) - waiting_B[:, None]
    is_new = ((token >= 0) & (token < n))[:, None, :, None]
    in_units = []
    for new, waiting in zip((keys_BNHC, values_BNHC), layer.from_exact(waiting_BHMX), strict=True):
        x = new.float().transpose(1, 2)
        index = token.clamp(0, n - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        x = x.gather(2, index).masked_fill(~is_new, 0)
        x[:, :, :unit] = torch.where((token[:, :unit] < 0)[:, None, :, None], waiting, x[:, :, :unit])
        in_units.append(x.unflatten(2, (count, unit)))
    return UnitTokens(in_units[0], in_units[1], waiting_B[:, None] + torch.arange(n, device=cache.device))


def _write_sinks(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BHNC: Tensor, values_BHNC: Tensor
) -> None:
    """Keep the first tokens of a text exact, in its first page."""
    if not layer.sinks:
        return
    positions_BN = batch.positions_BN
    b, n = (positions_BN < layer.sinks).nonzero(as_tuple=True)
    exact = layer.to_exact(keys_BHNC, values_BHNC)[b, :, n]
    _write_tail(layer, cache, batch.table_BP[b, 0], positions_BN[b, n] * layer.exact_bytes, exact)


def _write_tail(layer: PagedLayer, cache: Tensor, pages: Tensor, starts: Tensor, content: Tensor) -> None:
    """Write content (n, H, bytes) into the tails of pages (n,), from bytes `starts` (n,) on."""
    width = layer.tail_width
    at = starts[:, None] + torch.arange(content.shape[2], device=starts.device)
    cache[pages.long()[:, None], :, at // width, layer.slot_bytes + at % width] = content.transpose(1, 2)
