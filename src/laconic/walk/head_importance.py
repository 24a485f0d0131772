"""Importance of attention heads on the text of a domain: a pruning stage leaves the most important ones whole.

A head h adds W_o^h x_h to the residual stream, x_h its part of the input of the output projection. On the domain's text
that is a mean energy of tr(W_o^h H_hh W_o^h^T), H_hh the second moments of x_h. The importance of a head is this energy
divided by the energy of the residual stream after its block, so that heads of all blocks can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import observe
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.structure.anatomy import Tap, linear_at
from laconic.structure.calls import BlockCall
from laconic.structure.heads import Heads


def head_importance(
    block: nn.Module, taps: Sequence[Tap], heads: Heads, *, call: BlockCall, stream: Stream, device: torch.device
) -> list[float]:
    """Compute the importance of each head of a block, and replace the stream's hidden states by the block's output.

    Args:
        block: the block.
        taps: of the block.
        heads: of its attention.
        call: how the block is called.
        stream: hidden states before the block.
        device: where to compute.

    Returns:
        Energy of each query head relative to that of the residual stream after the block.

    Raises:
        ValueError: if the activations hold NaN or infinity.
    """
    with Passes(block, taps, call, stream, device, resume=False) as passes:
        H = observe(passes, [heads.tap], gram=True, advance=True)[heads.tap].H
    assert H is not None
    W = linear_at(block, heads.output).weight.detach().float()
    energy = [float(((W_h @ _block_of(H, h, heads.size)) * W_h).sum()) for h, W_h in enumerate(W.split(heads.size, 1))]
    residual = sum(float(x.float().square().sum(-1).mean(1).sum()) for x in stream.batches()) / len(stream.hidden)
    return [e / max(residual, 1e-30) for e in energy]


def _block_of(H: Tensor, h: int, size: int) -> Tensor:
    channels = slice(h * size, (h + 1) * size)
    return H[channels, channels]


def most_important(importance: Sequence[Sequence[float]], share: float) -> list[list[int]]:
    """Return the numbers of the most important heads of each block.

    Args:
        importance: of the heads of each block.
        share: of all heads, at least one head.
    """
    ranked = sorted((-value, block, h) for block, values in enumerate(importance) for h, value in enumerate(values))
    selection = ranked[: max(1, round(share * len(ranked)))]
    return [sorted(h for _, b, h in selection if b == block) for block in range(len(importance))]
