"""AWQ (Lin et al., arXiv 2306.00978): scale salient weight channels before rounding, by activation magnitude.

For every link the columns of the readers are multiplied by s, and the output of the source is divided by it: s_j is
x_j^a / w_j^(1-a), x_j the mean magnitude of input j, and w_j that of column j relative to its group. Of several ratios
a, the one is chosen whose rounding changes the block's output least on calibration activations. Then each group's range
is clipped where the error of the linear's output, e H e^T with the group's block of the second moments H, is least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from laconic.formats import Params, ScalarFormat, quantize
from laconic.formats.chunks import chunk_rows
from laconic.solvers.search import search_range
from laconic.stages.block import Block, BlockStage, stacked
from laconic.stages.linear import Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs
from laconic.structure.anatomy import Tap, linear_at
from laconic.structure.hooks import capture_outputs
from laconic.structure.links import Link, pool_to_source
from laconic.train.block_tuning import replaced_linears

# Tokens summed at once.
_CHUNK = 2048


class Awq(QuantizingStage, BlockStage):
    """Scale salient channels, then round.

    Attributes:
        clip: search ranges as well.
        search_tokens: calibration tokens on which ratios are compared.
        unlinked: what to do with a linear whose input no link can scale; `skip` rounds it unscaled.
    """

    example: ClassVar = {"scheme": "W4A16", "group_size": 32}

    method: Literal["awq"] = "awq"
    clip: bool = True
    search_tokens: int = Field(2048, ge=1)
    unlinked: Literal["error", "skip"] = "error"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, activations=True, links=True)

    def check(self, taps: Mapping[Tap, int], links: Mapping[Tap, Link]) -> None:
        unlinked = [tap for tap in taps if tap not in links]
        if unlinked and self.unlinked == "error":
            raise ValueError(
                f"the scale of {unlinked[0].linears[0]} cannot be moved into what feeds it (a quantized linear takes "
                "none); set unlinked: skip to round such linears unscaled, or ignore them"
            )

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        taps = block.targeted_taps()
        inputs = _observe(block, taps)
        sample = block.sample(self.search_tokens)
        dense_outputs, reference = _outputs(block, sample)
        scales: dict[Link, tuple[float, Tensor | None]] = {}
        # Ratios are searched on the unscaled block: scales of rows do not change how their weights are rounded.
        for link in dict.fromkeys(block.links[t] for t in taps if t in block.links):
            readers = [t for t in taps if block.links.get(t) is link]
            targets = [n for t in readers for n in block.targets(t)]
            earlier = _earlier(block, readers[0])
            outputs = {n: y for n, y in dense_outputs.items() if n in earlier}

            def cost(weights: Mapping[str, Tensor], outputs: Mapping[str, Tensor] = outputs) -> float:
                with replaced_linears(block.module, weights, outputs=outputs):
                    return float((block.run(sample).float() - reference).square().sum())

            mean = torch.stack([inputs[t].mean for t in readers]).mean(0)
            scales[link] = _search(block, targets, link, mean, cost)
        for link, (_, s) in scales.items():
            if s is not None:
                columns = block.fold(link, s)
                inputs.update((t, inputs[t].divided(columns)) for t in taps if block.links.get(t) is link)
        outcomes: dict[tuple[str, ...], Outcome] = {}
        for tap in taps:
            notes = {"ratio": scales[block.links[tap]][0]} if tap in block.links else {}
            for stack in block.stacks(tap):
                W = stacked(block.module, stack.linears)
                q = quantize(stack.format, W, self._ranges(stack.format, W, inputs[tap], block.dtype))
                outcomes[stack.linears] = Outcome(q, notes)
        return outcomes

    def _ranges(self, fmt: ScalarFormat, W: Tensor, inputs: _InputMeans, dtype: torch.dtype) -> Params:
        if not self.clip:
            return fmt.fit(W, dtype)
        if inputs.blocks is None or inputs.blocks.shape[-1] != fmt.tiling.group_size:
            return search_range(fmt, W, inputs.energy, dtype=dtype, steps=10, shrink_to=0.5)
        return search_range(fmt, W, hessian=inputs.blocks, dtype=dtype, steps=10, shrink_to=0.5)


@dataclass(frozen=True)
class _InputMeans:
    """Statistics of the input X of a tap.

    Attributes:
        mean: mean |X_j|, (in,).
        energy: mean X_j^2, (in,).
        blocks: for grids of groups, the blocks of the mean of x x^T on the diagonal, (groups, n, n).
    """

    mean: Tensor
    energy: Tensor
    blocks: Tensor | None

    def divided(self, s: Tensor) -> _InputMeans:
        """Return the statistics of X / s. s: (in,)."""
        blocks = self.blocks
        if blocks is not None:
            by_group = s.view(blocks.shape[0], -1)
            blocks = blocks / (by_group[:, :, None] * by_group[:, None, :])
        return _InputMeans(self.mean / s, self.energy / s.square(), blocks)


def _observe(block: Block, taps: Sequence[Tap]) -> dict[Tap, _InputMeans]:
    sums: dict[Tap, tuple[int, Tensor, Tensor, Tensor | None]] = {}
    for tap, activations in block.inputs(taps):
        n, group_size = activations.shape[-1], block.format(block.targets(tap)[0]).tiling.group_size
        for x in activations.reshape(-1, n).split(_CHUNK):
            x = x.float()
            parts = x.view(len(x), -1, group_size).transpose(0, 1) if group_size else None
            blocks = None if parts is None else parts.transpose(1, 2) @ parts
            count, mean, energy, blocks_sum = sums.get(tap, (0, 0.0, 0.0, 0.0))
            total = None if blocks is None else blocks_sum + blocks
            sums[tap] = (count + len(x), mean + x.abs().sum(0), energy + x.square().sum(0), total)
    return {
        tap: _InputMeans(mean / count, energy / count, None if blocks is None else blocks / count)
        for tap, (count, mean, energy, blocks) in sums.items()
    }


def _earlier(block: Block, tap: Tap) -> set[str]:
    """Return the linears that run before a tap, and so do not depend on its weights."""
    return {n for t in block.taps[: block.taps.index(tap)] for n in t.linears}


def _outputs(block: Block, sample: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the output of every linear for the sample, and of the block (float32)."""
    linears = {n: block.module.get_submodule(n) for tap in block.taps for n in tap.linears}
    with capture_outputs(linears) as outputs:
        return outputs, block.run(sample).float()


def _search(
    block: Block,
    targets: Sequence[str],
    link: Link,
    mean: Tensor,
    cost: Callable[[Mapping[str, Tensor]], float],
) -> tuple[float, Tensor | None]:
    """Search the ratio of least cost: in steps of 0.2, then of 0.1 and 0.05 around the best.

    Returns:
        The ratio, and its scales (one a linked channel of the source); None where no scale lowers the cost.
    """
    linears = {n: linear_at(block.module, n) for n in targets}
    x = pool_to_source(link, mean)
    group_size = block.format(targets[0]).tiling.group_size
    w = pool_to_source(link, _relative_size(torch.cat([linear.weight for linear in linears.values()]), group_size))

    def rounded(s: Tensor) -> dict[str, Tensor]:
        return {n: _round_scaled(linear.weight, s, block.format(n)) for n, linear in linears.items()}

    def attempt(ratio: float) -> tuple[float, Tensor]:
        s = (x.pow(ratio) / w.pow(1 - ratio).clamp(min=1e-6)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        return cost(rounded(s if link.channels is None else _spread(link, s))), s

    unscaled = cost(rounded(torch.ones(linears[targets[0]].in_features, device=mean.device)))
    costs = {r: attempt(r) for r in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}
    for step in (0.1, 0.05):
        best = min(costs, key=lambda r: costs[r][0])
        around = [round(best + d, 2) for d in (-step, step)]
        costs |= {r: attempt(r) for r in around if 0 <= r <= 1 and r not in costs}
    best = min(costs, key=lambda r: costs[r][0])
    least, s = costs[best]
    return (best, s) if least < unscaled else (-1.0, None)


def _spread(link: Link, s: Tensor) -> Tensor:
    """Return scales of a source's linked channels as scales of the readers' columns."""
    assert link.channels is not None
    _, index = link.channels.to(s.device).unique(return_inverse=True)
    return s[index]


def _relative_size(weight: Tensor, group_size: int | None) -> Tensor:
    """Return the mean over rows of |w| / max |w| of its group: how much of its grid a column uses. (in,)."""
    tiles = weight.detach().float().abs()
    tiles = tiles.view(len(tiles), -1, group_size or tiles.shape[1])
    return (tiles / tiles.amax(-1, keepdim=True).clamp(min=1e-10)).mean(0).flatten()


def _round_scaled(weight: Tensor, s: Tensor, fmt: ScalarFormat) -> Tensor:
    """Return Q(W s) / s: the columns scaled by s, rounded, and divided by s again."""
    out = torch.empty_like(weight)
    height = (fmt.tiling.block_structure or (1, 1))[0]
    rows = len(weight) if fmt.tiling.strategy == "tensor" else max(1, chunk_rows(weight) // height) * height
    for w, into in zip(weight.split(rows), out.split(rows), strict=True):
        scaled = w.float() * s
        into.copy_(quantize(fmt, scaled, fmt.fit(scaled)).decode() / s)
    return out
