"""Which attention heads matter most on the text of a domain: those that a pruning stage leaves whole.

A head adds W_o^h x_h to the residual stream, x_h what it attended to. On the domain's text that is a mean energy of
tr(W_o^h H_hh W_o^h^T), H_hh the second moments of x_h; a head counts by it as a share of the energy of the stream
behind its block, so that heads of all blocks can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import observe
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.structure.anatomy import BlockCall, Tap, linear_at
from laconic.structure.heads import Heads


def head_shares(
    block: nn.Module, taps: Sequence[Tap], heads: Heads, call: BlockCall, stream: Stream, device: torch.device
) -> list[float]:
    """What each head of a block counts; leaves in the stream what the block puts out."""
    with Passes(block, taps, call, stream, device, held=False) as passes:
        H = observe(passes, [heads.tap], gram=True, through=True)[heads.tap].H
    assert H is not None
    W = linear_at(block, heads.output).weight.detach().float()
    energy = [float(((own @ _square(H, h, heads.size)) * own).sum()) for h, own in enumerate(W.split(heads.size, 1))]
    behind = sum(float(x.float().square().sum(-1).mean(1).sum()) for x in stream.batches()) / len(stream.hidden)
    return [e / max(behind, 1e-30) for e in energy]


def _square(H: Tensor, h: int, size: int) -> Tensor:
    own = slice(h * size, (h + 1) * size)
    return H[own, own]


def most(shares: Sequence[Sequence[float]], ratio: float) -> list[list[int]]:
    """The heads that count most, by block: this share of all, at least one. shares: of each block's heads."""
    ranked = sorted((-share, block, h) for block, own in enumerate(shares) for h, share in enumerate(own))
    chosen = ranked[: max(1, round(ratio * len(ranked)))]
    return [sorted(h for _, b, h in chosen if b == block) for block in range(len(shares))]
