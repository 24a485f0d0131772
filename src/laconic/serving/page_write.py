"""Writing new tokens into pages.

A token is encoded when its unit is complete (where neighbouring tokens share a channel's range, a unit has several
tokens). It is kept exact as well, in its own page, until a newer token of that page takes its place: no new token
attends to it exactly by then. Nothing of a request is kept outside of its own pages, and a full page no longer changes,
so it can be shared.

Axes: B sequences, H key-value heads, N new tokens, E exact tokens (`PagedLayer.lookback` before the new ones, and
these), C channels, X bytes of a token. A cache is (pages, H, tokens of a page, bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.serving.page import PagedLayer, SequenceBatch


@dataclass(frozen=True)
class ExactTokens:
    """Exact keys and values of the new tokens, and of the tokens before them that these may attend to exactly.

    Attributes:
        keys_BHEC: (B, H, E, C) keys, float32.
        values_BHEC: (B, H, E, C) values, float32.
        positions_BE: (B, E) positions; negative where a sequence has no such token.
    """

    keys_BHEC: Tensor
    values_BHEC: Tensor
    positions_BE: Tensor


def write_tokens(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> ExactTokens:
    """Store new tokens: the units that they complete, and exact copies of the newest.

    Args:
        layer: Layout of the pages.
        cache: Pages, (pages, H, tokens of a page, X) uint8; written to.
        batch: The sequences.
        keys_BNHC: (B, N, H, C) keys of their new tokens.
        values_BNHC: (B, N, H, C) values of their new tokens.

    Returns:
        The exact tokens, for attention; those of earlier pages are read by `read_earlier_pages`, when all sequences of
        a step are written.
    """
    pages, page_tokens = layer.heads_of_pages(cache), cache.shape[2]
    exact = _exact_tokens(layer, cache, batch, keys_BNHC, values_BNHC)
    begin_B, length_B = batch.positions_BN[:, 0], batch.lengths_B.long()
    first_B = begin_B // layer.unit
    count = (layer.unit - 1 + keys_BNHC.shape[1] + layer.unit - 1) // layer.unit
    unit_BU = first_B[:, None] + torch.arange(count, device=cache.device)
    b, u = ((unit_BU + 1) * layer.unit <= length_B[:, None]).nonzero(as_tuple=True)
    if len(b):
        start = unit_BU[b, u] * layer.unit
        in_unit = torch.arange(layer.unit, device=cache.device)
        at = (start - begin_B[b] + layer.lookback)[:, None] + in_unit
        slots, shared = layer.encode(
            exact.keys_BHEC.transpose(1, 2)[b[:, None], at].transpose(1, 2),
            exact.values_BHEC.transpose(1, 2)[b[:, None], at].transpose(1, 2),
            start[:, None] + in_unit,
        )
        page = batch.table_BP[b, start // page_tokens].long()
        slot = (start % page_tokens)[:, None] + in_unit
        _write_bytes(
            pages,
            page.repeat_interleave(layer.unit),
            layer.slot_addresses(slot.flatten(), page_tokens),
            slots.transpose(1, 2).flatten(0, 1),
        )
        if layer.shared_bytes:
            addresses = layer.shared_addresses(start % page_tokens // layer.unit, page_tokens)
            _write_bytes(pages, page, addresses, shared[:, :, 0])
    _write_exact(layer, cache, batch, keys_BNHC, values_BNHC)
    return exact


def read_earlier_pages(layer: PagedLayer, cache: Tensor, batch: SequenceBatch, exact: ExactTokens) -> ExactTokens:
    """Read the exact tokens of pages before that of the first new token, which other sequences may just have filled.

    Args:
        layer: Layout of the pages.
        cache: Pages.
        batch: The sequences.
        exact: Result of `write_tokens`.

    Returns:
        All exact tokens.
    """
    if not layer.residual_length:
        return exact
    positions_BE = exact.positions_BE[:, : layer.lookback]
    earlier_BE = positions_BE < batch.positions_BN[:, :1] // cache.shape[2] * cache.shape[2]
    keys, values = _read_recent(layer, cache, batch, positions_BE)
    in_earlier = earlier_BE[:, None, :, None]

    def joined(read: Tensor, x_BHEC: Tensor) -> Tensor:
        return torch.cat(
            [torch.where(in_earlier, read, x_BHEC[:, :, : layer.lookback]), x_BHEC[:, :, layer.lookback :]], 2
        )

    return replace(exact, keys_BHEC=joined(keys, exact.keys_BHEC), values_BHEC=joined(values, exact.values_BHEC))


def _exact_tokens(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> ExactTokens:
    """Return the new tokens behind the exact ones that are in the page of the first of them."""
    begin_B = batch.positions_BN[:, :1]
    positions_BE = begin_B - layer.lookback + torch.arange(layer.lookback + keys_BNHC.shape[1], device=cache.device)
    keys, values = keys_BNHC.float().transpose(1, 2), values_BNHC.float().transpose(1, 2)
    if layer.lookback:
        earlier = _read_recent(layer, cache, batch, positions_BE[:, : layer.lookback])
        keys, values = torch.cat([earlier[0], keys], 2), torch.cat([earlier[1], values], 2)
    return ExactTokens(keys, values, positions_BE)


def _read_recent(layer: PagedLayer, cache: Tensor, batch: SequenceBatch, positions_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Read exact tokens from their pages: keys and values, (B, H, E, C) float32; zero where positions are negative."""
    page_tokens = cache.shape[2]
    at = positions_BE.clamp(min=0)
    page_BE = batch.table_BP.gather(1, at // page_tokens).long()
    start = layer.recent_at(page_tokens)
    recent = layer.heads_of_pages(cache)[..., start : start + layer.recent * layer.exact_bytes]
    exact_BEHX = recent.unflatten(2, (layer.recent, layer.exact_bytes))[page_BE, :, at % page_tokens % layer.recent]
    keys, values = layer.from_exact(exact_BEHX.masked_fill((positions_BE < 0)[..., None, None], 0))
    return keys.transpose(1, 2), values.transpose(1, 2)


def _write_exact(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BNHC: Tensor, values_BNHC: Tensor
) -> None:
    """Keep the newest tokens of each page exact, and the first tokens of a text in its first page."""
    positions_BN, page_tokens = batch.positions_BN, cache.shape[2]
    pages = layer.heads_of_pages(cache)
    starts_and_masks = []
    if layer.recent:
        # Of the new tokens of a page that would take the same place, the last is written.
        end_BN = torch.minimum((positions_BN // page_tokens + 1) * page_tokens, batch.lengths_B.long()[:, None])
        recent_BN = layer.recent_at(page_tokens) + positions_BN % page_tokens % layer.recent * layer.exact_bytes
        starts_and_masks.append((recent_BN, positions_BN + layer.recent >= end_BN))
    if layer.sinks:
        sinks_BN = page_tokens * layer.slot_bytes + positions_BN * layer.exact_bytes
        starts_and_masks.append((sinks_BN, positions_BN < layer.sinks))
    for start_BN, mask_BN in starts_and_masks:
        b, n = mask_BN.nonzero(as_tuple=True)
        page = batch.table_BP[b, positions_BN[b, n] // page_tokens].long()
        addresses = start_BN[b, n][:, None] + torch.arange(layer.exact_bytes, device=cache.device)
        _write_bytes(pages, page, addresses[:, None], layer.to_exact(keys_BNHC[b, n], values_BNHC[b, n]))


def _write_bytes(pages: Tensor, page: Tensor, addresses: Tensor, content: Tensor) -> None:
    """Write content (n, H, bytes) to addresses (n, H or 1, bytes) in the heads of pages (n,)."""
    heads = torch.arange(pages.shape[1], device=pages.device)
    pages[page[:, None, None], heads[:, None], addresses] = content
