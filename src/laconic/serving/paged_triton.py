"""Attention over packed pages on a GPU: launches of `serving.attend_pages_triton`.

`paged_history` attends over the packed tokens alone, for any number of new tokens; `serving.paged_attention` adds the
exact ones. For single new tokens `paged_write` stores and `paged_decode` attends over all tokens: three kernels of
static shapes, without a look at how long a text is, so that a CUDA graph replays them.

Axes: B sequences, Q query heads (H R), H key-value heads, R query heads that share one, N new tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.packed import segment
from laconic.kv.planes import plane_widths
from laconic.kv.scheme import HeadGroup
from laconic.serving.page import PagedLayer, Scoring, SequenceBatch
from laconic.serving.slot import SlotLayout

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("attention over packed pages on a GPU needs Triton: pip install triton") from e

from laconic.kv.splits_triton import LaunchConfig, combine_splits
from laconic.serving.attend_pages_triton import attend_pages
from laconic.serving.write_pages_triton import write_pages

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
# Rows of a program, at most.
_MAX_ROWS = 32
_EXACT_BLOCK = 16
# Numbers of a unit, which a program holds at once.
_MAX_UNIT_NUMBERS = 1 << 14
_COMBINED_CHANNELS = 32
_WORDS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def default_launch(layer: PagedLayer) -> LaunchConfig:
    """Return the default division of the kernel's work.

    Args:
        layer: Layout of the pages. With outliers, or keys that are rotated as they are read, registers hold no more
            than 32 tokens.
    """
    formats = (fmt for group in layer.groups for fmt in (group.keys, group.values))
    outliers = any(fmt.outliers(layer.channels) for fmt in formats)
    return LaunchConfig(block_tokens=32) if outliers or layer.rotary is not None else LaunchConfig()


def paged_history(
    layer: PagedLayer,
    cache: Tensor,
    batch: SequenceBatch,
    q_BHRNC: Tensor,
    scoring: Scoring,
    *,
    first_B: Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention of new tokens over the packed tokens before those that they attend to exactly, sinks left out.

    Args:
        layer: Layout of the pages, for which `why_not_by_kernel` is None.
        cache: Pages, (pages, H, tokens of a page, X) uint8.
        batch: The sequences.
        q_BHRNC: Queries, float32, rotated as keys are.
        scoring: Settings of the scores.
        first_B: First token of each sequence that is read, the first of a page; the first of all if None.
        launch: Division of the kernel's work; the default if None.

    Returns:
        The attention (B, H, R, N, C), and the log of the sum of its exponentials (B, H, R, N, 1); zero and -inf over
        no tokens.
    """
    step = _Step(q_BHRNC.contiguous(), batch, scoring, first_B=first_B)
    sums, log_sums = _attend(layer, cache, step, launch or default_launch(layer))
    log_sums = log_sums * _LN_2
    log_sum = log_sums.logsumexp(-1, keepdim=True)
    shares = torch.exp(log_sums - log_sum.masked_fill(log_sum == -torch.inf, 0))
    shape = *q_BHRNC.shape[:4], -1
    return (sums * shares[..., None]).sum(-2).view(shape), log_sum.view(shape)


def paged_decode(
    layer: PagedLayer,
    cache: Tensor,
    batch: SequenceBatch,
    tokens: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    *,
    out: Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> Tensor:
    """Compute the attention of one new token of each sequence, which is written already.

    Args:
        layer: Layout of the pages, for which `why_not_by_kernel` is None, without rotations.
        cache: Pages, (pages, H, tokens of a page, X) uint8.
        batch: The sequences; those of no tokens are padding.
        tokens: Queries (B, Q, C), keys (B, H, C) and values (B, H, C) of the new tokens.
        scoring: Settings of the scores.
        out: (B, Q, C) contiguous tensor for the result; a new one if None.
        launch: Division of the kernel's work; the default if None.

    Returns:
        (B, Q, C), in the dtype of the queries unless `out` has another.
    """
    q, keys, values = (_heads_together(t) for t in tokens)
    B, Q, C = q.shape
    step = _Step(q.unflatten(1, (layer.heads, -1))[:, :, :, None], batch, scoring, exact=(keys, values))
    sums, log_sums = _attend(layer, cache, step, launch or default_launch(layer))
    if out is None:
        out = torch.empty(B, Q, C, dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    tile = min(C, _COMBINED_CHANNELS)
    with torch.cuda.device_of(q):
        combine_splits[(B * Q, C // tile)](
            sums, log_sums, out, log_sums.shape[3], CHANNELS=C, TILE=tile, SPLITS=32, num_warps=2
        )
    return out


def why_not_written(layer: PagedLayer) -> str | None:
    """Return why `paged_write` cannot write a layer's pages; None where it can.

    Args:
        layer: Layout of the pages, for which `why_not_by_kernel` is None.
    """
    if layer.rotations is not None:
        return "keys and values are rotated (`rotation`)"
    if layer.unit & (layer.unit - 1) or layer.unit * layer.channels > _MAX_UNIT_NUMBERS:
        return f"units of {layer.unit} tokens are no power of two, or are large"
    if any(f.datatype == "table" and f.num_bits > 4 for g in layer.groups for f in (g.keys, g.values)):
        return "tables have more than 16 levels"
    return None


def paged_write(layer: PagedLayer, cache: Tensor, batch: SequenceBatch, keys_BHC: Tensor, values_BHC: Tensor) -> None:
    """Store one new token of each sequence as `write_tokens` does, in one launch of a static shape.

    Args:
        layer: Layout of the pages, for which `why_not_written` is None.
        cache: Pages, (pages, H, tokens of a page, X) uint8; written to.
        batch: The sequences; those of no tokens are padding.
        keys_BHC: (B, H, C) keys of the new tokens.
        values_BHC: (B, H, C) values of the new tokens.
    """
    page_tokens, keys, values = cache.shape[2], _heads_together(keys_BHC), _heads_together(values_BHC)
    cos, sin = (None, None) if layer.rotary is None else layer.rotary
    warps = max(1, min(8, layer.unit * layer.channels // 1024))
    for g, group in enumerate(layer.groups):
        of_keys, of_values = (_side_arguments(layer, g, side, page_tokens) for side in ("keys", "values"))
        heads = layer.heads if group.heads is None else len(group.heads)
        with torch.cuda.device_of(keys):
            write_pages[(len(keys) * heads,)](
                keys, values, cache, batch.table_BP, batch.lengths_B, _group_heads(group, keys.device),
                *of_keys.tensors, *of_values.tensors, cos, sin,
                heads, cache.stride(0), cache.stride(1), batch.table_BP.stride(0), keys.stride(0), values.stride(0),
                *of_keys.written_constants, *of_values.written_constants,
                PAGE=page_tokens, UNIT=layer.unit, SINKS_AT=page_tokens * layer.slot_bytes,
                RECENT_AT=layer.recent_at(page_tokens), SINKS=layer.sinks, RECENT=layer.recent,
                EXACT_TYPE=_DTYPES[layer.dtype], CHANNELS=layer.channels, num_warps=warps,
            )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """Inputs of a step of attention beside pages.

    Attributes:
        q_BHRNC: Queries; those of a sequence lie one after another.
        batch: The sequences.
        scoring: Settings of the scores.
        exact: Keys and values of the new tokens, where exact tokens are attended to as well.
        first_B: First packed token of each sequence that is read; the first of all if None.
    """

    q_BHRNC: Tensor
    batch: SequenceBatch
    scoring: Scoring
    exact: tuple[Tensor, Tensor] | None = None
    first_B: Tensor | None = None


def _attend(layer: PagedLayer, cache: Tensor, step: _Step, launch: LaunchConfig) -> tuple[Tensor, Tensor]:
    """Return the attention over each split (B, H, rows, splits, C), and the log2 of its sum of exponentials."""
    q, batch, page_tokens = step.q_BHRNC, step.batch, cache.shape[2]
    B, H, R, N, C = q.shape
    rows = R * N
    tile = min(_MAX_ROWS, max(8, triton.next_power_of_2(rows)))
    chunks = triton.cdiv(rows, tile)
    exact = step.exact is not None
    blocks = [_block_tokens(launch.block_tokens, page_tokens, group) for group in layer.groups]
    # As many programs as fill the GPU, if every sequence is as long as the longest may be.
    wanted = triton.cdiv(launch.programs * _multiprocessors(q.device), B * H * chunks)
    splits = max(1, min(wanted, triton.cdiv(batch.longest, min(blocks)))) + exact
    sums = torch.empty(B, H, rows, splits, C, device=q.device)
    log_sums = torch.empty(B, H, rows, splits, device=q.device)
    table, lengths = batch.table_BP, batch.lengths_B
    assert table.stride(1) == lengths.stride(0) == 1
    cos, sin = _angles(layer)
    k_new, v_new = step.exact or (None, None)
    for g, group in enumerate(layer.groups):
        keys, values = (_side_arguments(layer, g, side, page_tokens) for side in ("keys", "values"))
        heads = H if group.heads is None else len(group.heads)
        with torch.cuda.device_of(q):
            attend_pages[(splits, B * heads, chunks)](
                q, k_new, v_new, cache, table, lengths, step.first_B, _group_heads(group, q.device),
                *keys.tensors, *values.tensors, cos, sin, sums, log_sums,
                H, heads, rows, N, cache.stride(0), cache.stride(1), table.stride(0), q.stride(0),
                *(0 if t is None else t.stride(0) for t in (k_new, v_new)), step.scoring.scale * _LOG2_E,
                *keys.constants, *values.constants,
                PAGE=page_tokens, UNIT=layer.unit, SINKS_AT=page_tokens * layer.slot_bytes,
                RECENT_AT=layer.recent_at(page_tokens), SINKS=layer.sinks, RECENT=layer.recent,
                RESIDUAL=layer.residual_length, WINDOW=step.scoring.window or 0, EXACT_TYPE=_DTYPES[layer.dtype],
                EXACT_ITEM=layer.dtype.itemsize, EXACT=exact, SINGLE=N == 1, ROWS=tile, CHANNELS=C, BLOCK=blocks[g],
                EXACT_BLOCK=_EXACT_BLOCK,
                # The interpreter has no assembler.
                ASSEMBLER=q.is_cuda,
                num_warps=launch.warps * max(1, tile // 16), **launch.options,
            )  # fmt: skip
    return sums, log_sums


@dataclass(frozen=True)
class _SideArguments:
    """Arguments of the kernel for packed keys, or values, in the order of its parameters.

    Attributes:
        tensors: Static scales and offsets (H, C), and levels; None for those that the format lacks.
        constants: Where arrays begin in a page, the layout of codes, and that of ranges.
        written_constants: Those of them that writing needs.
    """

    tensors: tuple[Tensor | None, ...]
    constants: tuple[Any, ...]

    @property
    def written_constants(self) -> tuple[Any, ...]:
        starts, (low, high, _, _, datatype), ranges = self.constants[:5], self.constants[6:11], self.constants[11:]
        return (*starts, low, high, datatype, *ranges)


def _side_arguments(layer: PagedLayer, g: int, side: str, page_tokens: int) -> _SideArguments:
    """Return the arguments of keys or values of a group of heads; kept with the layer, whose tensors they share."""
    kept: dict[Any, _SideArguments] = layer.__dict__.setdefault("_kernel_arguments", {})
    if (g, side, page_tokens) not in kept:
        kept[g, side, page_tokens] = _make_side_arguments(layer, g, side, page_tokens)
    return kept[g, side, page_tokens]


def _make_side_arguments(layer: PagedLayer, g: int, side: str, page_tokens: int) -> _SideArguments:
    group, layout = layer.groups[g], layer.layouts[g]
    fmt: KvFormat = getattr(group, side)
    static = layer.static.get(f"{side}.{g}", {})
    heads = list(range(layer.heads) if group.heads is None else group.heads)
    ranges = {}
    if fmt.group_size is None:
        for name in {"scale", "offset"} & set(static):
            ranges[name] = torch.zeros(layer.heads, layer.channels, device=static[name].device)
            ranges[name][heads] = static[name].float().expand(len(heads), layer.channels)
    tensors = ranges.get("scale"), ranges.get("offset"), static.get("levels")
    at = _array_starts(layer, layout, side, page_tokens)
    starts = [at.get(n, -1) for n in ("codes", "scale", "offset", "outlier_index", "outlier_value")]
    # Channels that a rotary embedding rotates against each other lie in different segments.
    most = layer.channels // 2 if side == "keys" and layer.rotary is not None else layer.channels
    segment_channels = min(segment(fmt, layer.channels), most)
    # A product has at least 16 words on a side.
    word_bytes = min(4, segment_channels // 16)
    widths = plane_widths(fmt.num_bits)
    zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric and fmt.datatype == "int" else 0
    by_token = fmt.axis == "token" and fmt.group_size is not None
    codes = widths[0], sum(widths[1:]), segment_channels, word_bytes, fmt.datatype
    numbers = by_token, fmt.group_size or 0, zero, fmt.outliers(layer.channels)
    return _SideArguments(tensors, (*starts, _WORDS[word_bytes], *codes, *numbers))


def _array_starts(layer: PagedLayer, layout: SlotLayout, side: str, page_tokens: int) -> dict[str, int]:
    """Return the first byte, in a head of a page, of the array of each stored tensor."""
    units, shared_at = page_tokens // layer.unit, layer.shared_at(page_tokens)
    of_slots = {f.name: page_tokens * f.start for f in layout.fields if f.side == side}
    return of_slots | {f.name: shared_at + units * f.start for f in layout.shared if f.side == side}


def _angles(layer: PagedLayer) -> tuple[Tensor | None, Tensor | None]:
    """Return cosines and sines of every position, (positions, C / 2) float16, where keys are stored before these."""
    return (None, None) if layer.rotary is None else (_half(layer.rotary[0]), _half(layer.rotary[1]))


@lru_cache(maxsize=16)
def _half(angles: Tensor) -> Tensor:
    """Return the first half of channels, of a table that many layers share."""
    return angles[:, : angles.shape[1] // 2].to(torch.float16 if angles.is_cuda else torch.float32).contiguous()


def _heads_together(x: Tensor) -> Tensor:
    """Return x (B, heads, C), copied unless the heads of a sequence lie one after another."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _block_tokens(most: int, page_tokens: int, group: HeadGroup) -> int:
    """Return the tokens of a block: a power of two, all of one page, and of one group where channels have ranges."""
    sizes = [fmt.group_size for fmt in (group.keys, group.values) if fmt.axis == "channel" and fmt.group_size]
    return min(most, *(size & -size for size in (page_tokens, *sizes)))


@lru_cache(maxsize=64)
def _group_heads(group: HeadGroup, device: torch.device) -> Tensor | None:
    return None if group.heads is None else torch.tensor(group.heads, dtype=torch.int32, device=device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
