"""Attention over pages of packed keys and values, in plain torch, or by a kernel that reads the same bytes.

A token attends to itself exactly and to every earlier token as it is stored, so the result does not depend on how a
text was cut into steps, on what else is in a batch, or on whether a page was written for another request with the same
beginning.

Axes: B sequences, Q query heads (H R), H key-value heads, R query heads that share one, N new tokens, T tokens of some
pages, U units, M tokens of a unit, P pages, C channels, X bytes. A cache is (pages, H, tokens of a page, X).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.packed import kernel_runs_on
from laconic.kv.planes import field_size
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import UnitTokens
from laconic.solvers.rotate import rotate

# Scores, or numbers of decoded keys and values, that are held in memory at once: 128 MiB of float32.
_MAX_HELD = 1 << 25


def paged_attention(
    layer: PagedLayer,
    cache: Tensor,
    batch: SequenceBatch,
    tokens: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    units: UnitTokens | None = None,
) -> Tensor:
    """Compute the attention of new tokens, which are written already.

    Args:
        layer: Layout of the pages.
        cache: Pages.
        batch: The sequences.
        tokens: Queries (B, N, Q, C), keys (B, N, H, C) and values (B, N, H, C) of the new tokens.
        scoring: Settings of the scores.
        units: Result of `write_units`, where tokens are stored in units.

    Returns:
        (B, N, Q, C) float32.
    """
    queries, keys, values = (t.float() for t in tokens)
    q_BHRNC = queries.unflatten(2, (layer.heads, -1)).permute(0, 2, 3, 1, 4)
    softmax = _RunningSoftmax(q_BHRNC, keys.transpose(1, 2), values.transpose(1, 2), scoring)
    if units is not None:
        _add_units(softmax, layer, batch, q_BHRNC, units)
    if layer.rotations:
        softmax.out = rotate(softmax.out, layer.rotations[1])
        q_BHRNC = rotate(q_BHRNC, layer.rotations[0]) if layer.rotates_queries else q_BHRNC
    if kernel_reads_pages(layer, scoring, cache):
        from laconic.serving.paged_triton import paged_history

        if layer.sinks:
            _add_tokens(softmax, layer, batch, q_BHRNC, _read_sinks(layer, cache, batch))
        return _output(layer, softmax.merged_with(*paged_history(layer, cache, batch, q_BHRNC, scoring)))
    _add_pages(softmax, layer, cache, batch, q_BHRNC)
    return _output(layer, softmax.out / softmax.total)


@dataclass(frozen=True)
class _DecodedTokens:
    """Tokens of some pages, decoded; keys and values are rotated as `PagedLayer.decode` leaves them."""

    positions_T: Tensor
    keys_BHTC: Tensor
    values_BHTC: Tensor


class _RunningSoftmax:
    """Online softmax over each new token and the tokens before it, which are added piece by piece to bound memory.

    Attributes:
        top: Largest score so far, (B, H, R, N, 1).
        total: Sum of exponentials so far, relative to `top`.
        out: Sum of values so far, weighted likewise, (B, H, R, N, C).
    """

    def __init__(self, q_BHRNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor, scoring: Scoring) -> None:
        self.scoring, slopes = scoring, scoring.slopes
        self.slopes = None if slopes is None else slopes.view(1, q_BHRNC.shape[1], -1, 1, 1)
        own_scores = torch.einsum("bhrnc,bhnc->bhrn", q_BHRNC, k_BHNC) * scoring.scale
        self.top = _softcap(own_scores, scoring.softcap)[..., None]
        self.total = torch.ones_like(self.top)
        self.out = v_BHNC[:, :, None].expand_as(q_BHRNC)

    def add(
        self, products: Tensor, distance: Tensor, visible: Tensor, weighted_sum: Callable[[Tensor], Tensor]
    ) -> None:
        """Add some tokens.

        Args:
            products: Products of queries and keys, (B, H, R, N, tokens).
            distance: Number of tokens from each of them to each new token, (B, N, tokens).
            visible: Whether the new token attends to them, (B, N, tokens).
            weighted_sum: Weighs their values: (B, H, R, N, tokens) -> (B, H, R, N, C).
        """
        scores = _softcap(products * self.scoring.scale, self.scoring.softcap)
        if self.slopes is not None:
            scores = scores - self.slopes * distance[:, None, None]
        if self.scoring.window is not None:
            visible = visible & (distance < self.scoring.window)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        shares, rescale = torch.exp(scores - top), torch.exp(self.top - top)
        self.total, self.top = self.total * rescale + shares.sum(-1, keepdim=True), top
        self.out = self.out * rescale + weighted_sum(shares)

    def merged_with(self, out: Tensor, log_sum: Tensor) -> Tensor:
        """Return the attention over the added tokens and over other tokens.

        Args:
            out: Attention over the other tokens, (B, H, R, N, C).
            log_sum: Log of their sum of exponentials, (B, H, R, N, 1).
        """
        top = torch.maximum(self.top, log_sum)
        rescale, share = torch.exp(self.top - top), torch.exp(log_sum - top)
        return (self.out * rescale + out * share) / (self.total * rescale + share)


def _add_units(
    softmax: _RunningSoftmax, layer: PagedLayer, batch: SequenceBatch, q_BHRNC: Tensor, units: UnitTokens
) -> None:
    """Add the exact earlier tokens of each new token's own unit."""
    positions_BN = batch.positions_BN
    place_BN = positions_BN - positions_BN // layer.unit * layer.unit
    distance_BNM = place_BN[:, :, None] - torch.arange(layer.unit, device=positions_BN.device)
    products = units.gather(torch.einsum("bhrumc,bhunc->bhrumn", units.scatter(q_BHRNC), units.keys_BHUMC))

    def weighted_sum(shares_BHRNM: Tensor) -> Tensor:
        return units.gather(torch.einsum("bhrumn,bhunc->bhrumc", units.scatter(shares_BHRNM), units.values_BHUMC))

    softmax.add(products, distance_BNM, distance_BNM > 0, weighted_sum)


def _add_tokens(
    softmax: _RunningSoftmax, layer: PagedLayer, batch: SequenceBatch, q_BHRNC: Tensor, decoded: _DecodedTokens
) -> None:
    """Add decoded tokens; those of a new token's own unit, and later ones, are not visible."""
    positions_BN, positions_T = batch.positions_BN, decoded.positions_T
    unit_start_BN = positions_BN // layer.unit * layer.unit
    products = torch.einsum("bhrnc,bhtc->bhrnt", q_BHRNC, decoded.keys_BHTC)
    weighted_sum = partial(torch.einsum, "bhtc,bhrnt->bhrnc", decoded.values_BHTC)
    distance_BNT, visible_BNT = positions_BN[:, :, None] - positions_T, positions_T < unit_start_BN[:, :, None]
    softmax.add(products, distance_BNT, visible_BNT, weighted_sum)


def _add_pages(
    softmax: _RunningSoftmax, layer: PagedLayer, cache: Tensor, batch: SequenceBatch, q_BHRNC: Tensor
) -> None:
    """Add the tokens of all pages, several at a time."""
    page_tokens, first = cache.shape[2], 0
    if softmax.scoring.window is not None:
        first = max(0, int(batch.positions_BN[:, 0].min()) + 1 - softmax.scoring.window) // page_tokens
    pages = -(-batch.longest // page_tokens)
    scores_per_token = q_BHRNC[..., 0].numel()
    numbers_per_token = 2 * q_BHRNC[:, :, 0, 0].numel()
    step = max(1, _MAX_HELD // (max(scores_per_token, numbers_per_token) * page_tokens))
    for start in range(first, pages, step):
        numbers_BP = batch.table_BP[:, start : start + step][:, : pages - start]
        decoded = _read_pages(layer, cache, batch, numbers_BP, start * page_tokens)
        _add_tokens(softmax, layer, batch, q_BHRNC, decoded)


def _output(layer: PagedLayer, out_BHRNC: Tensor) -> Tensor:
    """Rotate sums of stored values back, and lay them out as attention returns them: (B, N, Q, C)."""
    out = rotate(out_BHRNC, layer.rotations[1].mT) if layer.rotations else out_BHRNC
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _read_sinks(layer: PagedLayer, cache: Tensor, batch: SequenceBatch) -> _DecodedTokens:
    """Read the exact first tokens."""
    positions_T = torch.arange(layer.sinks, device=cache.device)
    tails_BHX = cache[batch.table_BP[:, 0].long()][..., layer.slot_bytes : layer.row_bytes].flatten(2)
    exact = tails_BHX[..., : layer.shared_at].unflatten(2, (layer.sinks, layer.exact_bytes))
    keys, values = layer.from_exact(exact.masked_fill(_unwritten(layer, batch, positions_T), 0))
    return _DecodedTokens(positions_T, *layer.rotate_exact(keys, values))


def _read_pages(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, numbers_BP: Tensor, start: int
) -> _DecodedTokens:
    """Decode the pages of these numbers, of which the first token has the position `start`."""
    page_tokens = cache.shape[2]
    positions_T = start + torch.arange(numbers_BP.shape[1] * page_tokens, device=cache.device)
    rows = cache[numbers_BP.long()].transpose(1, 2)  # (B, H, P, tokens of a page, X)
    slots_BHTX = rows[..., : layer.slot_bytes].flatten(2, 3)
    tails_BHPX = rows[..., layer.slot_bytes : layer.row_bytes].flatten(3)
    units = page_tokens // layer.unit
    shared = tails_BHPX[..., layer.shared_at : layer.shared_at + units * layer.shared_bytes]
    shared_BHUX = shared.unflatten(3, (units, layer.shared_bytes)).flatten(2, 3)
    # Bytes not written yet are leftovers of other requests, and may decode to NaN.
    unwritten = _unwritten(layer, batch, positions_T)
    slots_BHTX = slots_BHTX.masked_fill(unwritten, 0)
    shared_BHUX = shared_BHUX.masked_fill(unwritten[:, :, :: layer.unit], 0)
    keys, values = layer.decode(slots_BHTX, shared_BHUX, positions_T[None])
    if layer.sinks and start == 0:
        exact = tails_BHPX[:, :, 0, : layer.shared_at].unflatten(2, (layer.sinks, layer.exact_bytes))
        sinks = layer.from_exact(exact.masked_fill(unwritten[:, :, : layer.sinks], 0))
        keys[:, :, : layer.sinks], values[:, :, : layer.sinks] = layer.rotate_exact(*sinks)
    return _DecodedTokens(positions_T, keys, values)


def _unwritten(layer: PagedLayer, batch: SequenceBatch, positions_T: Tensor) -> Tensor:
    """Return whether tokens are not encoded yet, (B, 1, T, 1)."""
    encoded_B = batch.lengths_B // layer.unit * layer.unit
    return (positions_T >= encoded_B[:, None])[:, None, :, None]


def _softcap(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores


def kernel_reads_pages(layer: PagedLayer, scoring: Scoring, cache: Tensor) -> bool:
    """Return whether the Triton kernel reads a layer's pages.

    It does where Triton runs on the device, all heads are stored alike, in integer codes with dynamic ranges and keys
    after their rotary embedding, and scores have neither softcap nor slopes.

    Args:
        layer: Layout of the pages.
        scoring: Settings of the scores.
        cache: The pages, on the device of the attention.
    """
    if not kernel_runs_on(cache.device) or len(layer.groups) > 1 or layer.rotary is not None:
        return False
    if any(n % 2 for n in (*cache.stride()[:3], cache.data_ptr(), layer.slot_bytes, layer.row_bytes)):
        return False
    if scoring.softcap or scoring.slopes is not None:
        return False
    return all(_kernel_reads(fmt, layer.channels) for fmt in (layer.groups[0].keys, layer.groups[0].values))


def _kernel_reads(fmt: KvFormat, channels: int) -> bool:
    """Return whether the kernel reads a format; a product of a tensor core has at least 16 channels on a side."""
    plain = fmt.datatype == "int" and not fmt.outlier_ratio and fmt.group_size is not None
    power_of_two = not channels & (channels - 1)
    return plain and fmt.num_bits in (2, 3, 4, 8) and power_of_two and field_size(channels, fmt.num_bits) >= 16
