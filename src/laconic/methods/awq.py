"""AWQ (Lin et al., arXiv 2306.00978): scale salient weight channels before rounding, by activation magnitude.

For every link the columns of the readers are multiplied by s, and what feeds them divided by it: s_j is x_j^a over
w_j^(1-a), x_j the mean size of input j and w_j that of column j relative to its group. Of several ratios a, the one
whose rounding changes the block's output least on real activations is taken. Then each group's range is clipped where
the error of the linear's output, e H e^T with the group's own block of the second moments H, is least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from laconic.formats import Format, Params, fit, quantize
from laconic.formats.pieces import rows_at_once
from laconic.solvers.search import search_range
from laconic.stages.block import Block, stacked, stacks
from laconic.stages.stage import BlockStage, Outcome, QuantizingStage
from laconic.structure.anatomy import Tap, linear_at
from laconic.structure.hooks import capture_outputs
from laconic.structure.links import Link, pool_to_source
from laconic.train.block_tuning import standing_in

# Tokens summed at a time.
_RUN = 2048


class Awq(QuantizingStage, BlockStage):
    """clip: search ranges as well. search_tokens: calibration tokens on which ratios are compared. unlinked: what to do
    with a linear that no scale can be taken from (`skip` rounds it as it is)."""

    method: Literal["awq"] = "awq"
    clip: bool = True
    search_tokens: int = Field(2048, ge=1)
    unlinked: Literal["error", "skip"] = "error"

    @property
    def links(self) -> bool:
        return True

    def check(self, taps: Mapping[Tap, int], links: Mapping[Tap, Link]) -> None:
        lost = [tap for tap in taps if tap not in links]
        if lost and self.unlinked == "error":
            raise ValueError(
                f"nothing that feeds {lost[0].linears[0]} can take its scale (what is quantized already cannot); "
                "set unlinked: skip to round such linears unscaled, or ignore them"
            )

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        fmt, taps = self.result.weights, block.targeted_taps()
        seen = _look(block, taps, fmt.tiling.group_size)
        sample = block.some(self.search_tokens)
        before, reference = _outputs(block, sample)
        chosen: dict[Link, tuple[float, Tensor | None]] = {}
        # Ratios are found on the block as it was: a scale that goes into rows changes the rounding of none.
        for link in dict.fromkeys(block.links[t] for t in taps if t in block.links):
            behind = [t for t in taps if block.links.get(t) is link]
            targets = [n for t in behind for n in block.targets(t)]
            known = {n: y for n, y in before.items() if n in _earlier(block, behind[0])}

            def cost(weights: Mapping[str, Tensor], known: Mapping[str, Tensor] = known) -> float:
                with standing_in(block.module, weights, known=known):
                    return float((block.run(sample).float() - reference).square().sum())

            mean = torch.stack([seen[t].mean for t in behind]).mean(0)
            chosen[link] = _search(block.module, targets, link, mean, fmt, cost)
        for link, (_, s) in chosen.items():
            if s is not None:
                columns = block.fold(link, s)
                seen.update((t, seen[t].over(columns)) for t in taps if block.links.get(t) is link)
        made: dict[tuple[str, ...], Outcome] = {}
        for tap in taps:
            notes = {"ratio": chosen[block.links[tap]][0]} if tap in block.links else {}
            for names in stacks(block.module, block.targets(tap), self.result):
                W = stacked(block.module, names)
                made[names] = Outcome(quantize(fmt, W, self._ranges(fmt, W, seen[tap], block.dtype)), notes)
        return made

    def _ranges(self, fmt: Format, W: Tensor, seen: _Seen, dtype: torch.dtype) -> Params:
        if not self.clip:
            return fit(fmt, W, dtype)
        if seen.blocks is None:
            return search_range(fmt, W, seen.energy, dtype=dtype, steps=10, shrink_to=0.5)
        return search_range(fmt, W, hessian=seen.blocks, dtype=dtype, steps=10, shrink_to=0.5)


@dataclass(frozen=True)
class _Seen:
    """Of the tap's input X: mean |X_j| (in,), mean X_j^2 (in,), and for grids of a group the blocks of the mean of
    x x^T that lie on the diagonal (groups, n, n)."""

    mean: Tensor
    energy: Tensor
    blocks: Tensor | None

    def over(self, s: Tensor) -> _Seen:
        """The same of X / s."""
        blocks = self.blocks
        if blocks is not None:
            by_group = s.view(blocks.shape[0], -1)
            blocks = blocks / (by_group[:, :, None] * by_group[:, None, :])
        return _Seen(self.mean / s, self.energy / s.square(), blocks)


def _look(block: Block, taps: Sequence[Tap], group_size: int | None) -> dict[Tap, _Seen]:
    sums: dict[Tap, tuple[int, Tensor, Tensor, Tensor | None]] = {}
    for tap, activations in block.inputs(taps):
        n = activations.shape[-1]
        for x in activations.reshape(-1, n).split(_RUN):
            x = x.float()
            parts = x.view(len(x), -1, group_size).transpose(0, 1) if group_size else None
            blocks = None if parts is None else parts.transpose(1, 2) @ parts
            count, mean, energy, old = sums.get(tap, (0, 0.0, 0.0, 0.0))
            total = None if blocks is None else old + blocks
            sums[tap] = (count + len(x), mean + x.abs().sum(0), energy + x.square().sum(0), total)
    return {
        tap: _Seen(mean / count, energy / count, None if blocks is None else blocks / count)
        for tap, (count, mean, energy, blocks) in sums.items()
    }


def _earlier(block: Block, tap: Tap) -> set[str]:
    """Linears that run before a tap, and so do not depend on its weights."""
    return {n for t in block.taps[: block.taps.index(tap)] for n in t.linears}


def _outputs(block: Block, sample: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What every linear puts out for the sample, and the block (float32)."""
    linears = {n: block.module.get_submodule(n) for tap in block.taps for n in tap.linears}
    with capture_outputs(linears) as outputs:
        return outputs, block.run(sample).float()


def _search(
    module: nn.Module,
    targets: Sequence[str],
    link: Link,
    mean: Tensor,
    fmt: Format,
    cost: Callable[[Mapping[str, Tensor]], float],
) -> tuple[float, Tensor | None]:
    """The ratio of least cost, and its scales (one a linked channel of the source); None where none helps.

    Ratios are tried a fifth apart, then a tenth and a twentieth around the best.
    """
    x = pool_to_source(link, mean)
    w = pool_to_source(
        link, _relative_size(torch.cat([linear_at(module, n).weight for n in targets]), fmt.tiling.group_size)
    )

    def attempt(ratio: float) -> tuple[float, Tensor]:
        s = (x.pow(ratio) / w.pow(1 - ratio).clamp(min=1e-6)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        columns = s if link.channels is None else _spread(link, s)
        return cost({n: _rounded(linear_at(module, n).weight, columns, fmt) for n in targets}), s

    plain = torch.ones(linear_at(module, targets[0]).in_features, device=mean.device)
    unscaled = cost({n: _rounded(linear_at(module, n).weight, plain, fmt) for n in targets})
    tried = {r: attempt(r) for r in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}
    for step in (0.1, 0.05):
        best = min(tried, key=lambda r: tried[r][0])
        around = [round(best + d, 2) for d in (-step, step)]
        tried |= {r: attempt(r) for r in around if 0 <= r <= 1 and r not in tried}
    best = min(tried, key=lambda r: tried[r][0])
    least, s = tried[best]
    return (best, s) if least < unscaled else (-1.0, None)


def _spread(link: Link, s: Tensor) -> Tensor:
    """Scales of a source's linked channels as scales of the readers' columns."""
    assert link.channels is not None
    _, index = link.channels.to(s.device).unique(return_inverse=True)
    return s[index]


def _relative_size(weight: Tensor, group_size: int | None) -> Tensor:
    """Mean over rows of |w| / max |w| of its group: how much of its grid a column uses. (in,)."""
    tiles = weight.detach().float().abs()
    tiles = tiles.view(len(tiles), -1, group_size or tiles.shape[1])
    return (tiles / tiles.amax(-1, keepdim=True).clamp(min=1e-10)).mean(0).flatten()


def _rounded(weight: Tensor, s: Tensor, fmt: Format) -> Tensor:
    """Q(W s) / s: what a linear is once its columns were scaled by s, rounded, and the scale taken back."""
    out = torch.empty_like(weight)
    height = (fmt.tiling.block_structure or (1, 1))[0]
    rows = len(weight) if fmt.tiling.strategy == "tensor" else max(1, rows_at_once(weight) // height) * height
    for w, into in zip(weight.split(rows), out.split(rows), strict=True):
        scaled = w.float() * s
        into.copy_(quantize(fmt, scaled, fit(fmt, scaled)).decode() / s)
    return out
