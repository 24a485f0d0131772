"""`kv_attention` on a GPU: flash-decoding that unpacks codes in registers and never multiplies one by its range.

A program attends over a split of the tokens for all query heads of a key-value head (`kv.attend_packed_triton`); a
second kernel combines the splits by their log-sum-exps (`kv.splits_triton`). There are splits of sinks, of the recent
window and of packed tokens.

Axes: B sequences, Q query heads, H key-value heads, N new tokens, T packed tokens, W tokens of the window, S sinks, G
groups of numbers that share a range, C channels of a head, X bytes or words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from laconic.kv.format import KvFormat
from laconic.kv.packed import PackedHistory, PackedTokens, segment
from laconic.kv.planes import plane_widths

try:
    import triton
except ImportError as e:
    raise ImportError("attention over a packed cache on a GPU needs Triton: pip install triton") from e

from laconic.kv.attend_packed_triton import attend_split
from laconic.kv.splits_triton import LaunchConfig, combine_splits

# Tokens of a split in 16 bit: few, so that no such program takes longer than those of packed tokens.
_DENSE_SPLIT = 64
# Tokens of a block of it: few, so that its registers and shared memory do not limit the kernel.
_DENSE_BLOCK = 16
_COMBINED_CHANNELS = 32
_LOG2_E = 1.4426950408889634
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_DEFAULT_LAUNCH = LaunchConfig()
"""It was the fastest on an H100 at 2, 3 and 8 bits, and at 4 in one of two tunings (benchmarks/kv_attention.py)."""


def kv_attention_triton(
    q_BQNC: Tensor,
    history: PackedHistory,
    scaling: float | None = None,
    *,
    launch: LaunchConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Compute `kv_attention` on CUDA tensors, or on any where Triton's interpreter runs (TRITON_INTERPRET=1).

    Args:
        q_BQNC: Queries of the new tokens.
        history: Tokens that they attend to.
        scaling: Factor of the logits, C^-1/2 if None.
        launch: Division of the kernel's work; the default if None.
        splits: Splits of the packed tokens of a head; as many as fill the GPU if None.

    Returns:
        (B, Q, N, C) in the dtype of the queries.
    """
    B, Q, N, C = q_BQNC.shape
    q = q_BQNC.contiguous()
    keys, values, angles, launch = history.keys, history.values, history.angles, launch or _DEFAULT_LAUNCH
    key_window, value_window = (_dense_rows(x) for x in history.window)
    empty = key_window[:, :, :0], value_window[:, :, :0]
    key_sinks, value_sinks = empty if history.sinks is None else (_dense_rows(x) for x in history.sinks)
    dense = key_window, value_window, key_sinks, value_sinks
    H, rows = key_window.shape[1], Q // key_window.shape[1] * N
    plan = _plan_splits(history, launch, splits or triton.cdiv(launch.programs * _multiprocessors(q.device), B * H))
    sums = torch.empty(B, Q, N, plan.splits, C, device=q.device)
    log_sums = torch.empty(B, Q, N, plan.splits, device=q.device)
    out = torch.empty_like(q)
    # Channels that a rotary embedding rotates against each other lie in different segments.
    k = _KernelSide(keys, B, H, C, C // 2 if angles else C)
    v = _KernelSide(values, B, H, C, C)
    cos, sin = (None, None) if angles is None else (a.contiguous() for a in angles)
    with torch.cuda.device_of(q):
        attend_split[(plan.splits, B * H)](
            q, *k.tensors, *v.tensors, *dense, sums, log_sums, history.first_B, cos, sin,
            0 if cos is None or len(cos) == 1 else cos.stride(0),
            H, keys.tokens, key_window.shape[2], plan.sink_tokens, plan.sink_splits, plan.window_splits,
            plan.packed_begin, plan.split_tokens, (C**-0.5 if scaling is None else scaling) * _LOG2_E,
            *k.strides, *v.strides, *(stride for x in dense for stride in x.stride()[:3]),
            *k.constants, *v.constants,
            NEW=N, QUERIES=rows, ROWS=max(8, triton.next_power_of_2(rows)), CHANNELS=C, BLOCK=plan.block,
            DENSE_SPLIT=_DENSE_SPLIT, DENSE_BLOCK=_DENSE_BLOCK,
            # The interpreter has no assembler.
            ASSEMBLER=q.is_cuda,
            num_warps=launch.warps * max(1, triton.next_power_of_2(rows) // 16), **launch.options,
        )  # fmt: skip
        tile = min(C, _COMBINED_CHANNELS)
        combine_splits[(B * Q * N, C // tile)](
            sums, log_sums, out, plan.splits, CHANNELS=C, TILE=tile, SPLITS=32, num_warps=2
        )
    return out


@dataclass(frozen=True)
class _SplitPlan:
    """Division of a history's tokens into programs: splits of sinks, of the window and of packed tokens.

    Attributes:
        splits: All splits.
        sink_splits: Splits of sinks.
        window_splits: Splits of the recent window.
        sink_tokens: Sinks that replace packed tokens.
        packed_begin: First packed token that is read.
        split_tokens: Packed tokens of a split.
        block: Packed tokens of a block.
    """

    splits: int
    sink_splits: int
    window_splits: int
    sink_tokens: int
    packed_begin: int
    split_tokens: int
    block: int


def _plan_splits(history: PackedHistory, launch: LaunchConfig, splits: int) -> _SplitPlan:
    """Split a history, its packed tokens into so many splits of whole blocks at most."""
    tokens = history.keys.tokens
    block = _block_tokens(launch.block_tokens, history.keys.fmt, history.values.fmt)
    sink_tokens = 0 if history.sinks is None else min(history.sinks[0].shape[2], tokens)
    # Where all rows begin together, blocks that consist of sinks are left out.
    sink_blocks = sink_tokens // block if history.first_B is None else 0
    blocks = triton.cdiv(tokens, block) - sink_blocks if tokens > sink_tokens else 0
    blocks_per_split = triton.cdiv(blocks, max(1, min(splits, blocks)))
    packed_splits = triton.cdiv(blocks, blocks_per_split) if blocks else 0
    sink_splits = triton.cdiv(sink_tokens, _DENSE_SPLIT)
    window_splits = triton.cdiv(history.window[0].shape[2], _DENSE_SPLIT)
    return _SplitPlan(
        splits=sink_splits + window_splits + packed_splits,
        sink_splits=sink_splits,
        window_splits=window_splits,
        sink_tokens=sink_tokens,
        packed_begin=sink_blocks * block,
        split_tokens=blocks_per_split * block,
        block=block,
    )


class _KernelSide:
    """Arguments of the kernel for packed keys, or values, in the order of its parameters.

    Attributes:
        tensors: Codes, scales, offsets, levels, indices of outliers, outliers; None for those that the format lacks.
        strides: Strides of codes (B, H), ranges (B, H, T or G, C or G), indices (B, H) and outliers (B, H).
        constants: LOW, HIGH, SEGMENT, WORD_BYTES, TYPE, BY_TOKEN, GROUP, ZERO, OUTLIERS.
    """

    def __init__(self, packed: PackedTokens, batch: int, heads: int, channels: int, max_segment: int) -> None:
        fmt, stored, static = packed.fmt, packed.stored, packed.static or {}
        segment_channels = min(segment(fmt, channels), max_segment)
        # A product has at least 16 words on a side.
        word_bytes = min(4, segment_channels // 16)
        widths = plane_widths(fmt.num_bits)
        codes_BHTX = _dense_rows(stored["codes"]).view(_WORDS[word_bytes])
        if fmt.group_size is None:
            static_ranges = {n: static[n] for n in ("scale", "offset") if n in static}
            ranges = {n: p.expand(batch, heads, channels)[:, :, None] for n, p in static_ranges.items()}
        else:
            ranges = {n: _dense_rows(stored[n]) for n in ("scale", "offset") if n in stored}
        scale = ranges["scale"]
        zero = 2 ** (fmt.num_bits - 1) if fmt.symmetric and fmt.datatype == "int" else 0
        by_token = fmt.axis == "token" and fmt.group_size is not None
        outliers = [_dense_rows(stored[n]) if n in stored else None for n in ("outlier_index", "outlier_value")]
        outlier_strides = [(0, 0) if t is None else t.stride()[:2] for t in outliers]
        self.tensors = codes_BHTX, scale, ranges.get("offset"), static.get("levels"), *outliers
        self.strides = (*codes_BHTX.stride()[:2], *scale.stride(), *outlier_strides[0], *outlier_strides[1])
        layout: tuple[Any, ...] = (widths[0], sum(widths[1:]), segment_channels, word_bytes, fmt.datatype)
        self.constants = *layout, by_token, fmt.group_size or 0, zero, fmt.outliers(channels)


def _dense_rows(x_BHTC: Tensor) -> Tensor:
    """Return x, copied unless its rows lie one after another; batches and heads may lie anywhere."""
    return x_BHTC if x_BHTC.stride(3) == 1 and x_BHTC.stride(2) == x_BHTC.shape[3] else x_BHTC.contiguous()


def _block_tokens(most: int, *formats: KvFormat) -> int:
    """Return the tokens of a block: a power of two; where channels have ranges, all of one group of tokens."""
    for fmt in formats:
        if fmt.axis == "channel" and fmt.group_size:
            most = min(most, fmt.group_size & -fmt.group_size)
    return most


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
