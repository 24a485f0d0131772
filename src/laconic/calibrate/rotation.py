"""The rotation of a head's channels with which storing it costs attention least, found on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laconic.calibrate.attention import Seen, query_cost
from laconic.kv.format import KvFormat
from laconic.solvers.rotate import balanced, hadamard


def find_turn(seen: Seen, which: str, fmt: KvFormat, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Of none, Hadamard's, and for keys with ranges of channels the one that balances them, each head's best.

    which: `keys` or `values`, stored as `fmt`. error: what attention loses by a rotation (heads or 1, channels,
    channels), of each head (heads,). Returns: (heads, channels, channels), orthogonal.
    """
    x = seen.stored_keys if which == "keys" else seen.values
    heads, n = x.shape[1], x.shape[-1]
    none = torch.eye(n, device=x.device).expand(heads, n, n)
    tried = [none]
    if not n & (n - 1):
        tried.append(hadamard(none))
    if which == "keys" and fmt.axis == "channel" and n % 2 == 0:
        tried.append(balanced(query_cost(seen), _spread(x, fmt.group_size), none))
    return _best(tried, [error(turn) for turn in tried])


def _spread(x: Tensor, group: int | None) -> Tensor:
    """How far apart tokens are that share a range, (heads, channels, channels): their covariance. x: (samples, heads,
    tokens, channels)."""
    if group is None:
        parts = x.transpose(0, 1).flatten(1, 2)[:, None]
    else:
        parts = x[:, :, : x.shape[2] // group * group].transpose(0, 1).reshape(x.shape[1], -1, group, x.shape[-1])
    parts = parts - parts.mean(2, keepdim=True)
    return (parts.mT @ parts).sum(1)


def _best(tried: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """Of each head the one of least error."""
    best = torch.stack(list(errors)).argmin(0)
    return torch.stack([tried[int(which)][head] for head, which in enumerate(best)]).contiguous()
