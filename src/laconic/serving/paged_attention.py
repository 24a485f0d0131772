"""Attention over pages of packed keys and values, in plain torch, or by a kernel that reads the same bytes.

A token attends to itself and to recent tokens exactly (`PagedLayer.exact_from`), and to every earlier token as it is
stored. So the result does not depend on how a text was cut into steps, on what else is in a batch, or on whether a page
was written for another request with the same beginning.

Axes: B sequences, Q query heads (H R), H key-value heads, R query heads that share one, N new tokens, E exact tokens, T
tokens of some pages, P pages, C channels, X bytes. A cache is (pages, H, tokens of a page, bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from laconic.kv.packed import kernel_reads, kernel_runs_on
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.page_write import ExactTokens, read_earlier_pages
from laconic.solvers.rotate import rotate

# Scores, or numbers of decoded keys and values, that are held in memory at once: 128 MiB of float32.
_MAX_HELD = 1 << 25
# New tokens whose exact tokens are attended to at once.
_MAX_ROWS = 256
# New tokens of a sequence from which on pages are decoded for them, and tokens of a prompt that are decoded together.
_MIN_PROMPT, _PROMPT_STEP = 128, 1024
# Smallest number of tokens that the kernel reads at once: the smallest side of a product of tensor cores.
MIN_BLOCK = 16


def paged_attention(
    layer: PagedLayer,
    cache: Tensor,
    batch: SequenceBatch,
    q_BNQC: Tensor,
    exact: ExactTokens,
    scoring: Scoring,
) -> Tensor:
    """Compute the attention of new tokens, which are written already.

    Args:
        layer: Layout of the pages.
        cache: Pages.
        batch: The sequences.
        q_BNQC: Queries of the new tokens.
        exact: Result of `write_tokens`.
        scoring: Settings of the scores.

    Returns:
        (B, N, Q, C) float32.
    """
    q_BHRNC = q_BNQC.float().unflatten(2, (layer.heads, -1)).permute(0, 2, 3, 1, 4)
    exact = read_earlier_pages(layer, cache, batch, exact)
    softmax = _attend_exact(layer, batch, q_BHRNC, exact, scoring)
    if layer.rotations:
        softmax.out = rotate(softmax.out, layer.rotations[1])
        q_BHRNC = rotate(q_BHRNC, layer.rotations[0]) if layer.rotates_queries else q_BHRNC
    if kernel_runs_on(cache.device) and why_not_by_kernel(layer, scoring, cache.shape[2]) is None:
        _add_by_kernels(softmax, layer, cache, batch, q_BHRNC)
    else:
        _add_pages(softmax, layer, cache, batch, q_BHRNC)
    out = softmax.out / softmax.total
    out = rotate(out, layer.rotations[1].mT) if layer.rotations else out
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


@dataclass(frozen=True)
class _DecodedTokens:
    """Tokens of some pages, decoded; keys and values are rotated as `PagedLayer.decode` leaves them."""

    positions_T: Tensor
    keys_BHTC: Tensor
    values_BHTC: Tensor


class _RunningSoftmax:
    """Online softmax over the tokens that new ones attend to, which are added piece by piece to bound memory.

    Attributes:
        top: Largest score so far, (B, H, R, N, 1).
        total: Sum of exponentials so far, relative to `top`.
        out: Sum of values so far, weighted likewise, (B, H, R, N, C).
    """

    def __init__(self, like_BHRNC: Tensor, scoring: Scoring) -> None:
        self.scoring, slopes = scoring, scoring.slopes
        self.slopes = None if slopes is None else slopes.view(1, like_BHRNC.shape[1], -1, 1, 1)
        self.top = torch.full_like(like_BHRNC[..., :1], -torch.inf)
        self.total = torch.zeros_like(self.top)
        self.out = torch.zeros_like(like_BHRNC)

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

    def part(self, sequences: slice, rows: slice) -> _RunningSoftmax:
        """Return the softmax of some sequences and new tokens.

        Args:
            sequences: The sequences.
            rows: Their new tokens.
        """
        at = sequences, slice(None), slice(None), rows
        part = _RunningSoftmax(self.out[at], self.scoring)
        part.top, part.total, part.out = self.top[at], self.total[at], self.out[at]
        return part

    def merge(self, out: Tensor, log_sum: Tensor, sequences: slice = slice(None), rows: slice = slice(None)) -> None:
        """Add the attention over other tokens.

        Args:
            out: Attention over these tokens, (sequences, H, R, rows, C).
            log_sum: Log of their sum of exponentials, (sequences, H, R, rows, 1).
            sequences: The sequences.
            rows: Their new tokens.
        """
        at = sequences, slice(None), slice(None), rows
        top = torch.maximum(self.top[at], log_sum)
        rescale, share = torch.exp(self.top[at] - top), torch.exp(log_sum - top)
        self.out[at] = self.out[at] * rescale + out * share
        self.total[at] = self.total[at] * rescale + share
        self.top[at] = top


def _attend_exact(
    layer: PagedLayer, batch: SequenceBatch, q_BHRNC: Tensor, exact: ExactTokens, scoring: Scoring
) -> _RunningSoftmax:
    """Start a softmax with each new token and the exact tokens before it, so many new tokens at a time."""
    positions_BN, pieces = batch.positions_BN, []
    for start in range(0, positions_BN.shape[1], _MAX_ROWS):
        rows = slice(start, start + _MAX_ROWS)
        tokens = slice(start, start + layer.lookback + _MAX_ROWS)
        position_BN, position_BE = positions_BN[:, rows], exact.positions_BE[:, tokens]
        piece = _RunningSoftmax(q_BHRNC[:, :, :, rows], scoring)
        distance_BNE = position_BN[:, :, None] - position_BE[:, None]
        exact_from_BN = layer.exact_from(position_BN)
        visible_BNE = (distance_BNE >= 0) & (position_BE[:, None] >= exact_from_BN[:, :, None])
        products = torch.einsum("bhrnc,bhec->bhrne", q_BHRNC[:, :, :, rows], exact.keys_BHEC[:, :, tokens])
        weighted_sum = partial(torch.einsum, "bhec,bhrne->bhrnc", exact.values_BHEC[:, :, tokens])
        piece.add(products, distance_BNE, visible_BNE, weighted_sum)
        pieces.append(piece)
    softmax = pieces[0]
    softmax.top, softmax.total, softmax.out = (
        torch.cat([getattr(piece, name) for piece in pieces], 3) for name in ("top", "total", "out")
    )
    return softmax


def _add_tokens(
    softmax: _RunningSoftmax,
    layer: PagedLayer,
    batch: SequenceBatch,
    q_BHRNC: Tensor,
    decoded: _DecodedTokens,
) -> None:
    """Add decoded tokens; those that a new token attends to exactly, and later ones, are not visible."""
    positions_BN, positions_T = batch.positions_BN, decoded.positions_T
    exact_from_BN = layer.exact_from(positions_BN)
    products = torch.einsum("bhrnc,bhtc->bhrnt", q_BHRNC, decoded.keys_BHTC)
    weighted_sum = partial(torch.einsum, "bhtc,bhrnt->bhrnc", decoded.values_BHTC)
    distance_BNT, visible_BNT = positions_BN[:, :, None] - positions_T, positions_T < exact_from_BN[:, :, None]
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


def _add_by_kernels(
    softmax: _RunningSoftmax, layer: PagedLayer, cache: Tensor, batch: SequenceBatch, q_BHRNC: Tensor
) -> None:
    """Add packed tokens by the kernel that reads them as stored, or, for long prompts, most of them decoded.

    The kernel unpacks a token anew for a few rows, so for many rows it is faster to decode once.
    """
    from laconic.serving.paged_triton import paged_history

    new, lengths = batch.tokens_BN.shape[1], batch.known_lengths
    half = layer.dtype in (torch.float16, torch.bfloat16)
    decodes = new >= _MIN_PROMPT and softmax.scoring.window is None and (half or not cache.is_cuda)
    if decodes and lengths is not None and max(lengths) >= 2 * cache.shape[2]:
        for b, length in enumerate(lengths):
            of_b = slice(b, b + 1)
            one = SequenceBatch(batch.table_BP[of_b], batch.lengths_B[of_b], length, batch.tokens_BN[of_b])
            _add_long_prompt(softmax, layer, cache, one, q_BHRNC[of_b], of_b)
        return
    if layer.sinks:
        _add_tokens(softmax, layer, batch, q_BHRNC, _read_sinks(layer, cache, batch))
    softmax.merge(*paged_history(layer, cache, batch, q_BHRNC, softmax.scoring))


def _add_long_prompt(
    softmax: _RunningSoftmax,
    layer: PagedLayer,
    cache: Tensor,
    one: SequenceBatch,
    q_BHRNC: Tensor,
    of_b: slice,
) -> None:
    """Add the packed tokens of one sequence: decoded pages to the rows that attend to all of these, the rest as stored.

    Args:
        softmax: Softmax of all sequences.
        layer: Layout of the pages.
        cache: Pages.
        one: The sequence; `longest` is its length.
        q_BHRNC: Its queries.
        of_b: Its place in the softmax.
    """
    from laconic.serving.paged_triton import paged_history

    page_tokens, new, length = cache.shape[2], q_BHRNC.shape[3], one.longest
    begin = length - new

    def whole_pages(position: int) -> int:
        """Tokens of the whole pages that a token at this position attends to as they are stored."""
        return max(position - layer.residual_length, 0) // page_tokens * page_tokens

    together = max(1, _MAX_HELD // (2 * layer.heads * layer.channels * page_tokens)) * page_tokens
    within = max(1, _PROMPT_STEP // page_tokens) * page_tokens
    before = whole_pages(begin)
    ends = [*range(together, before, together), before] if before else []
    ends += range(before + within, whole_pages(length - 1) + 1, within)
    # The first row that attends to all tokens before each end.
    first_rows = [max(0, end + layer.residual_length - begin) for end in ends]
    start, q = 0, q_BHRNC.to(layer.dtype)
    for end, first_row in zip(ends, first_rows, strict=True):
        numbers = one.table_BP[:, start // page_tokens : end // page_tokens]
        decoded = _read_pages(layer, cache, one, numbers, start)
        q_rows, start = q[:, :, :, first_row:], end
        keys, values = decoded.keys_BHTC.to(layer.dtype), decoded.values_BHTC.to(layer.dtype)
        out, log_sum = _flash_attention(q_rows.flatten(2, 3), keys, values, scale=softmax.scoring.scale)[:2]
        shape = q_rows.shape[2:4]
        rows = slice(first_row, None)
        softmax.merge(out.float().unflatten(2, shape), log_sum.unflatten(2, shape)[..., None], of_b, rows)
    # Rows that attend to the same decoded tokens: the kernel adds the later ones.
    pieces = [0, *(row for row in first_rows if row), new]
    decoded_tokens = [before, *(end for end, row in zip(ends, first_rows, strict=True) if row)]
    for tokens, first_row, end_row in zip(decoded_tokens, pieces, pieces[1:], strict=False):
        rows = slice(first_row, end_row)
        piece = replace(one, lengths_B=one.lengths_B - (new - end_row), tokens_BN=one.tokens_BN[:, rows])
        if layer.sinks and not tokens:
            # In decoded pages sinks are exact already.
            part = softmax.part(of_b, rows)
            _add_tokens(part, layer, piece, q_BHRNC[:, :, :, rows], _read_sinks(layer, cache, piece))
            at = of_b, slice(None), slice(None), rows
            softmax.top[at], softmax.total[at], softmax.out[at] = part.top, part.total, part.out
        first_B = torch.full((1,), tokens, dtype=torch.int32, device=cache.device)
        q_rows = q_BHRNC[:, :, :, rows]
        softmax.merge(*paged_history(layer, cache, piece, q_rows, softmax.scoring, first_B=first_B), of_b, rows)


def _flash_attention(q_BHNC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Compute attention over all tokens: the result (B, H, N, C) and the log of its sum of exponentials (B, H, N)."""
    aten = torch.ops.aten
    cpu, cuda = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention
    outputs: tuple[Tensor, ...] = (cuda if q_BHNC.is_cuda else cpu)(q_BHNC, k_BHTC, v_BHTC, 0.0, False, scale=scale)
    return outputs


def _read_sinks(layer: PagedLayer, cache: Tensor, batch: SequenceBatch) -> _DecodedTokens:
    """Read the exact first tokens."""
    positions_T = torch.arange(layer.sinks, device=cache.device)
    start = cache.shape[2] * layer.slot_bytes
    exact = layer.heads_of_pages(cache)[batch.table_BP[:, 0].long(), :, start : start + layer.sinks * layer.exact_bytes]
    exact = exact.unflatten(2, (layer.sinks, layer.exact_bytes))
    keys, values = layer.from_exact(exact.masked_fill(_unwritten(layer, batch, positions_T), 0))
    return _DecodedTokens(positions_T, *layer.rotate_exact(keys, values))


def _read_pages(
    layer: PagedLayer, cache: Tensor, batch: SequenceBatch, numbers_BP: Tensor, start: int
) -> _DecodedTokens:
    """Decode the pages of these numbers, of which the first token has the position `start`."""
    page_tokens = cache.shape[2]
    positions_T = start + torch.arange(numbers_BP.shape[1] * page_tokens, device=cache.device)
    slots, shared = layer.read_slots(layer.heads_of_pages(cache)[numbers_BP.long()], page_tokens)
    slots_BHTX, shared_BHUX = (x.transpose(1, 2).flatten(2, 3) for x in (slots, shared))
    # Bytes not written yet are leftovers of other requests, and may decode to NaN.
    unwritten = _unwritten(layer, batch, positions_T)
    slots_BHTX = slots_BHTX.masked_fill(unwritten, 0)
    shared_BHUX = shared_BHUX.masked_fill(unwritten[:, :, :: layer.unit], 0)
    keys, values = layer.decode(slots_BHTX, shared_BHUX, positions_T[None])
    if layer.sinks and start == 0:
        sinks = _read_sinks(layer, cache, batch)
        keys[:, :, : layer.sinks], values[:, :, : layer.sinks] = sinks.keys_BHTC, sinks.values_BHTC
    return _DecodedTokens(positions_T, keys, values)


def _unwritten(layer: PagedLayer, batch: SequenceBatch, positions_T: Tensor) -> Tensor:
    """Return whether tokens are not encoded yet, (B, 1, T, 1)."""
    encoded_B = batch.lengths_B // layer.unit * layer.unit
    return (positions_T >= encoded_B[:, None])[:, None, :, None]


def _softcap(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores


def why_not_by_kernel(layer: PagedLayer, scoring: Scoring, page_tokens: int) -> str | None:
    """Return why the Triton kernel does not read a layer's pages; None where it does.

    Args:
        layer: Layout of the pages.
        scoring: Settings of the scores.
        page_tokens: Tokens of a page.
    """
    if page_tokens % MIN_BLOCK:
        return f"pages of {page_tokens} tokens are no multiple of {MIN_BLOCK}"
    if scoring.softcap or scoring.slopes is not None:
        return "scores have a softcap or ALiBi's slopes"
    if layer.rotary is not None and layer.rotations is not None:
        return "keys are rotated (`rotation`) before their rotary embedding"
    if layer.rotary is not None and (layer.rotary[0].shape[1] != layer.channels or layer.channels < 2 * MIN_BLOCK):
        return "the rotary embedding rotates a part of the channels, or there are few"
    for fmt in (f for group in layer.groups for f in (group.keys, group.values)):
        if not kernel_reads(fmt, layer.channels):
            return f"it does not read {fmt}"
    return None
