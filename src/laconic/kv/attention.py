"""Attention of the newest tokens over a packed cache: the reference in torch, and the choice of the kernel.

Query head q attends to key-value head q // R.

Axes: B sequences, Q query heads (H R), H key-value heads, R query heads that share one, N new tokens, T all tokens
(packed ones and the window), S sinks, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.kv.format import decode_kv
from laconic.kv.packed import PackedHistory, PackedTokens, kernel_reads, kernel_runs_on
from laconic.kv.positions import RotaryAngles


def kv_attention(q_BQNC: Tensor, history: PackedHistory, scaling: float | None = None) -> Tensor:
    """Compute attention of the newest tokens of each sequence over all its cached tokens.

    A Triton kernel reads the packed tokens as they are stored where it can; elsewhere they are decoded.

    Args:
        q_BQNC: Queries of the new tokens.
        history: Tokens that they attend to; a new token attends to itself and to earlier tokens.
        scaling: Factor of the logits, C^-1/2 if None.

    Returns:
        (B, Q, N, C) in the dtype of the queries.
    """
    channels = q_BQNC.shape[-1]
    formats = (history.keys.fmt, history.values.fmt)
    if kernel_runs_on(q_BQNC.device) and all(kernel_reads(fmt, channels) for fmt in formats):
        from laconic.kv.attention_triton import kv_attention_triton

        return kv_attention_triton(q_BQNC, history, scaling)
    return kv_attention_torch(q_BQNC, history, scaling)


def kv_attention_torch(q_BQNC: Tensor, history: PackedHistory, scaling: float | None = None) -> Tensor:
    """Compute `kv_attention` in plain torch and float32: the reference.

    Args:
        q_BQNC: Queries of the new tokens.
        history: Tokens that they attend to.
        scaling: Factor of the logits, C^-1/2 if None.

    Returns:
        (B, Q, N, C) in the dtype of the queries.
    """
    batch, heads, new, channels = q_BQNC.shape
    (key_window, value_window), sinks = history.window, history.sinks
    first_B = q_BQNC.new_zeros(batch, dtype=torch.long) if history.first_B is None else history.first_B.long()
    k_BHTC = _decoded(history.keys, key_window, sinks and sinks[0], first_B, history.angles)
    v_BHTC = _decoded(history.values, value_window, sinks and sinks[1], first_B)
    q_BHRNC = q_BQNC.float().reshape(batch, k_BHTC.shape[1], -1, new, channels)
    logits = q_BHRNC.flatten(2, 3) @ k_BHTC.mT * (channels**-0.5 if scaling is None else scaling)
    columns_T = torch.arange(k_BHTC.shape[2], device=q_BQNC.device)
    last_N = len(columns_T) - new + torch.arange(new, device=q_BQNC.device)
    visible_BNT = (columns_T >= first_B[:, None, None]) & (columns_T <= last_N[:, None])
    logits = logits.unflatten(2, (-1, new)).masked_fill(~visible_BNT[:, None, None], -torch.inf).flatten(2, 3)
    out: Tensor = logits.softmax(-1) @ v_BHTC
    return out.view(batch, heads, new, channels).to(q_BQNC.dtype)


def _decoded(
    packed: PackedTokens, window: Tensor, sinks: Tensor | None, first_B: Tensor, angles: RotaryAngles | None = None
) -> Tensor:
    """Decode packed keys or values, put sinks in their place, and append the window: (B, H, T, C) float32."""
    x_BHTC = decode_kv(packed.fmt, packed.stored, window.shape[-1], packed.static).float()
    if angles is not None:
        cos, sin = (angle.float()[:, None] for angle in angles)
        a, b = x_BHTC.chunk(2, -1)
        x_BHTC = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    if sinks is not None:
        columns_BS = first_B[:, None] + torch.arange(sinks.shape[2], device=x_BHTC.device)
        rows, which = ((columns_BS >= 0) & (columns_BS < x_BHTC.shape[2])).nonzero(as_tuple=True)
        x_BHTC[rows, :, columns_BS[rows, which]] = sinks[rows, :, which].float()
    return torch.cat([x_BHTC, window.float()], 2)
