"""Queries, keys and values of a block's attention on the calibration set, and the error that rounding them causes.

Axes: B samples, Q query heads, H key-value heads, R query heads that share one (Q = H R), T tokens, P picked queries, C
channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from laconic.calibrate.stream import Stream
from laconic.kv.format import KvFormat, StaticParams, decode_kv, encode_kv
from laconic.kv.positions import TokenPositions
from laconic.solvers.rotate import rotate
from laconic.structure.calls import BlockCall

_NAME = "laconic_capture"

# Calibration samples used: a cache's ranges and levels are few numbers.
_SAMPLES = 16
# Queries of each sample whose attention weights are computed: all of them would cost the square of the length.
_QUERIES = 256


@dataclass(frozen=True)
class AttentionCapture:
    """Inputs of one block's attention on calibration samples; all tensors are float32.

    Attributes:
        queries: (B, Q, T, C).
        keys: (B, H, T, C).
        values: (B, H, T, C).
        stored_keys: Keys as they are stored: before their rotary embedding where the scheme says so.
        stored_queries: Queries likewise.
        scaling: Factor of the products of queries and keys.
        positions: Puts the rotary embedding on; None where keys are stored with it.
        layer: Number of the block.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    stored_keys: Tensor
    stored_queries: Tensor
    scaling: float
    positions: TokenPositions | None
    layer: int

    def attention(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> Tensor:
        """Compute the output of attention over keys and values, for the picked queries.

        Args:
            keys_BHTC: Keys with their rotary embedding.
            values_BHTC: Values.

        Returns:
            (B, Q, P, C).
        """
        out_BQPC: Tensor = self.weights(keys_BHTC) @ self._per_query_head(values_BHTC)
        return out_BQPC

    @cached_property
    def output(self) -> Tensor:
        """Output of attention over unrounded keys and values, (B, Q, P, C); errors are measured against it."""
        return self.attention(self.keys, self.values)

    def weights(self, keys_BHTC: Tensor) -> Tensor:
        """Compute the causal attention weights of the picked queries.

        Args:
            keys_BHTC: Keys with their rotary embedding.

        Returns:
            (B, Q, P, T), zero for tokens after the query.
        """
        tokens, picked_P = keys_BHTC.shape[2], self.picked()
        scores = self.queries[:, :, picked_P] @ self._per_query_head(keys_BHTC).transpose(-1, -2) * self.scaling
        later = torch.arange(tokens, device=keys_BHTC.device) > picked_P[:, None]
        weights_BQPT: Tensor = scores.masked_fill_(later, -math.inf).softmax(-1)
        return weights_BQPT

    def picked(self) -> Tensor:
        """Return the tokens whose queries are used, evenly spaced: (P,) int64."""
        tokens = self.keys.shape[2]
        return torch.linspace(tokens // 4, tokens - 1, min(_QUERIES, tokens), device=self.keys.device).long()

    def _per_query_head(self, x_BHTC: Tensor) -> Tensor:
        return x_BHTC.repeat_interleave(self.queries.shape[1] // x_BHTC.shape[1], 1)


def key_weight(capture: AttentionCapture, rotation: Tensor | None = None) -> Tensor:
    """Compute the cost of a squared error in each channel of each stored key.

    To first order it is the sum over queries of the squared weight that the query gives the token times the square of
    the query's channel. Tokens with much weight are outliers of their channels; without this cost, range search would
    cut them off. A query meets a key from before its rotary embedding at many angles, so the mean of the two channels
    of a pair counts.

    Args:
        capture: Inputs of attention.
        rotation: Rotation of channels before they are stored, (H or 1, C, C).

    Returns:
        (B, H, T, C).
    """
    heads, queries_BQPC = capture.keys.shape[1], capture.stored_queries[:, :, capture.picked()]
    if rotation is not None and capture.positions is None:
        queries_BQPC = rotate(queries_BQPC.unflatten(1, (heads, -1)), rotation).flatten(1, 2)
    energy_BQPC = queries_BQPC.square()
    if capture.positions is not None:
        energy_BQPC = (energy_BQPC + energy_BQPC.roll(energy_BQPC.shape[-1] // 2, -1)) / 2
    cost_BQTC = capture.weights(capture.keys).square().transpose(-1, -2) @ energy_BQPC
    cost_BHTC: Tensor = cost_BQTC.unflatten(1, (heads, -1)).mean(2)
    if rotation is not None and capture.positions is not None:
        cost_BHTC = rotate(cost_BHTC, rotation.square())
    return cost_BHTC.clamp(min=1e-20)


def value_weight(capture: AttentionCapture) -> Tensor:
    """Compute the cost of a squared error in each value: the sum of the squared weights that its token gets.

    Args:
        capture: Inputs of attention.

    Returns:
        (B, H, T, 1).
    """
    weights_BQT = capture.weights(capture.keys).square().sum(2)
    cost_BHT1: Tensor = weights_BQT.unflatten(1, (capture.keys.shape[1], -1)).mean(2).unsqueeze(-1)
    return cost_BHT1.clamp(min=1e-12)


def query_cost(capture: AttentionCapture) -> Tensor:
    """Compute a matrix S of each head such that e' S e is the cost of an error e in its stored keys.

    To first order S is the second moment of the queries, each weighted by the sum of its squared attention weights. Of
    keys from before their rotary embedding only the diagonal is left, as in `key_weight`: over the angles at which
    queries meet keys, everything else averages out.

    Args:
        capture: Inputs of attention.

    Returns:
        (H, C, C), symmetric.
    """
    heads, queries_BQPC = capture.keys.shape[1], capture.stored_queries[:, :, capture.picked()]
    mass_BQP1 = capture.weights(capture.keys).square().sum(-1, keepdim=True)
    if capture.positions is not None:
        energy_HC = (queries_BQPC.square() * mass_BQP1).sum((0, 2)).unflatten(0, (heads, -1)).sum(1)
        return torch.diag_embed((energy_HC + energy_HC.roll(energy_HC.shape[-1] // 2, -1)) / 2)
    cost_HCC: Tensor = ((queries_BQPC * mass_BQP1).mT @ queries_BQPC).sum(0).unflatten(0, (heads, -1)).sum(1)
    return cost_HCC


def attention_error(
    capture: AttentionCapture, which: str, fmt: KvFormat, static: StaticParams, rotation: Tensor | None = None
) -> Tensor:
    """Compute ||o' - o||^2 / ||o||^2 of each key-value head, o' with its keys or its values rounded.

    Args:
        capture: Inputs of attention.
        which: What is rounded: `keys` or `values`.
        fmt: Format of what is rounded.
        static: Static parameters of the format.
        rotation: Rotation of channels before they are stored, (H or 1, C, C).

    Returns:
        (H,).
    """
    x_BHTC = capture.stored_keys if which == "keys" else capture.values
    whole = x_BHTC.shape[2] // fmt.tokens_at_once * fmt.tokens_at_once
    stored = x_BHTC[:, :, :whole] if rotation is None else rotate(x_BHTC[:, :, :whole], rotation)
    decoded = decode_kv(fmt, encode_kv(fmt, stored, static, torch.float32), x_BHTC.shape[-1], static)
    decoded = decoded if rotation is None else rotate(decoded, rotation.mT)
    rounded_BHTC = torch.cat([decoded, x_BHTC[:, :, whole:]], 2)
    if which == "values":
        out = capture.attention(capture.keys, rounded_BHTC)
    else:
        positions = capture.positions
        keys = positions.apply_rotary(rounded_BHTC, 0, capture.layer) if positions else rounded_BHTC
        out = capture.attention(keys, capture.values)
    heads = capture.keys.shape[1]
    error_H, square_H = (
        t.square().sum((0, 2, 3)).view(heads, -1).sum(1) for t in (out - capture.output, capture.output)
    )
    return error_H / square_H.clamp(min=1e-30)


def capture_attention(
    block: nn.Module,
    config: Any,
    call: BlockCall,
    stream: Stream,
    *,
    device: torch.device,
    positions: TokenPositions | None,
    layer: int,
) -> AttentionCapture:
    """Run a block on some calibration samples and record what its attention gets.

    Args:
        block: Decoder block.
        config: Config of the model.
        call: Calls the block on hidden states.
        stream: Hidden states of the calibration set before the block.
        device: Device on which the block runs.
        positions: Removes rotary embeddings, where keys are stored before them.
        layer: Number of the block.

    Returns:
        Queries, keys and values of at most 16 samples, evenly spaced.

    Raises:
        ValueError: The block's attention does not go through transformers' attention interface once a call.
    """
    picked = torch.linspace(0, len(stream.hidden) - 1, min(_SAMPLES, len(stream.hidden))).long().unique()
    with _recorded_attention(config) as calls:
        for i in picked.tolist():
            call(block, stream.hidden[i : i + 1].to(device), slice(i, i + 1))
    if len(calls) != len(picked):
        raise ValueError(
            f"cannot record the attention of '{config.get_text_config().model_type}', which a calibrated cache needs; "
            "use a method without calibration (kivi, kv_per_token)"
        )
    queries, keys, values = (torch.cat([x.float() for x in tensors]) for tensors in list(zip(*calls, strict=True))[:3])
    stored_keys, stored_queries = keys, queries
    if positions is not None:
        positions.crop(0)
        positions.begin_pass(0, keys.shape[2], None, None)
        stored_keys = positions.remove_rotary(keys, 0, layer)
        stored_queries = positions.remove_rotary(queries, 0, layer)
    return AttentionCapture(queries, keys, values, stored_keys, stored_queries, calls[0][3], positions, layer)


@contextmanager
def _recorded_attention(config: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor, float]]]:
    """Record queries, keys, values and scaling of every attention of a model while the context lasts."""
    calls: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        scaling = kwargs.get("scaling")
        calls.append((query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, record)
    text = config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = _NAME
    try:
        yield calls
    finally:
        text._attn_implementation = before
