"""The rotation of a head's channels with which rounding costs attention least, on the calibration set.

Axes: B samples, H key-value heads, T tokens, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laconic.calibrate.attention import AttentionCapture, query_cost
from laconic.formats.rotation import hadamard
from laconic.kv.format import KvFormat
from laconic.solvers.rotate import balancing_rotation


def find_rotation(capture: AttentionCapture, which: str, fmt: KvFormat, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Choose the best rotation of each head: none, Hadamard's, or for keys with ranges of channels a balancing one.

    Args:
        capture: Inputs of attention.
        which: What is rotated: `keys` or `values`.
        fmt: Its format.
        error: Returns the error of attention under a rotation (H or 1, C, C), of each head (H,).

    Returns:
        (H, C, C), orthogonal.
    """
    x_BHTC = capture.stored_keys if which == "keys" else capture.values
    heads, n = x_BHTC.shape[1], x_BHTC.shape[-1]
    identity = torch.eye(n, device=x_BHTC.device).expand(heads, n, n)
    candidates = [identity]
    if not n & (n - 1):
        candidates.append(hadamard(identity))
    if which == "keys" and fmt.axis == "channel" and n % 2 == 0:
        candidates.append(balancing_rotation(query_cost(capture), _covariance(x_BHTC, fmt.group_size), identity))
    return _best_per_head(candidates, [error(rotation) for rotation in candidates])


def _covariance(x_BHTC: Tensor, group_size: int | None) -> Tensor:
    """Compute the covariance of tokens that share a range, summed over ranges: (H, C, C)."""
    if group_size is None:
        groups = x_BHTC.transpose(0, 1).flatten(1, 2)[:, None]
    else:
        whole = x_BHTC[:, :, : x_BHTC.shape[2] // group_size * group_size]
        groups = whole.transpose(0, 1).reshape(x_BHTC.shape[1], -1, group_size, x_BHTC.shape[-1])
    groups = groups - groups.mean(2, keepdim=True)
    return (groups.mT @ groups).sum(1)


def _best_per_head(candidates: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    best_H = torch.stack(list(errors)).argmin(0)
    return torch.stack([candidates[int(i)][head] for head, i in enumerate(best_H)]).contiguous()
