"""SmoothQuant (Xiao et al., arXiv 2211.10438): move activation outliers into the weights by per-channel scales.

Column j of every linear after a norm is multiplied by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (eq. 4), and the
norm's output divided by it, so that weights and activations are about equally hard to round. The function of the block
is unchanged; a later stage rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from laconic.formats import quantize
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import Scheme, scheme
from laconic.formats.tiling import groups_for
from laconic.runtime.products import round_activations
from laconic.stages.block import Block, BlockStage, stacked
from laconic.stages.linear import Outcome
from laconic.stages.stage import Needs
from laconic.structure.anatomy import Tap
from laconic.structure.links import Link


class SmoothQuant(BlockStage):
    """Move activation outliers into weights.

    Attributes:
        alpha: how much of the range moves into the weights, 0 to 1; `search` tries several for each norm and takes the
            one of least output error under `scheme`.
        scheme: scheme under which alphas are compared.
        group_size: group size of the scheme's weights, if not the preset's.
        search_tokens: calibration tokens on which alphas are compared.
    """

    example: ClassVar = {"alpha": 0.5}

    method: Literal["smoothquant"] = "smoothquant"
    alpha: float | Literal["search"] = 0.5
    scheme: Literal["W8A8", "W7A7", "W6A6", "W4A8"] = "W8A8"
    group_size: int | None = None
    search_tokens: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _buildable(self) -> SmoothQuant:
        _ = self.compared
        return self

    @cached_property
    def compared(self) -> Scheme:
        """The scheme under which alphas are compared."""
        return scheme(self.scheme, group_size=self.group_size)

    @field_validator("alpha", mode="before")
    @classmethod
    def _a_share(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not number and value != "search":
            raise ValueError(f"should be a number from 0 to 1, or 'search', not {value}")
        return value

    @property
    def needs(self) -> Needs:
        return Needs(activations=True, links=True, original_activations=True)

    def check(self, taps: Mapping[Tap, int], links: Mapping[Tap, Link]) -> None:
        smoothed = {tap: width for tap, width in taps.items() if tap in links and links[tap].is_norm}
        if not smoothed:
            raise ValueError(
                f"no norm feeds {next(iter(taps)).linears[0]} and only linears that are not quantized yet, so its "
                "scale cannot be moved; narrow targets to blocks that have such a norm, or leave this stage out"
            )
        size = as_scalar(self.compared.weights).tiling.group_size if self.alpha == "search" else None
        for tap, width in smoothed.items():
            if size and width % size:
                raise ValueError(
                    f"alphas are compared under {self.scheme} with group_size {size}, which does not divide the "
                    f"{width} inputs of {tap.linears[0]}; set group_size to {groups_for(width)}, as in the stage "
                    "that rounds"
                )

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        taps = [t for t in block.targeted_taps() if t in block.links and block.links[t].is_norm]
        inputs = _observe(block, taps, self.search_tokens if self.alpha == "search" else 0)
        outcomes: dict[tuple[str, ...], Outcome] = {}
        for link in dict.fromkeys(block.links[t] for t in taps):
            readers = [t for t in taps if block.links[t] is link]
            largest = torch.stack([inputs[t].largest for t in readers]).amax(0)
            W = stacked(block.module, [n for t in readers for n in block.targets(t)])
            alpha = self.alpha
            if alpha == "search":
                x = torch.cat([inputs[t].sample for t in readers])
                alpha = _search(W, x, largest, self.compared)
            block.fold(link, scales(largest, W, alpha))
            for tap in readers:
                names = tuple(block.targets(tap))
                outcomes[names] = Outcome(stacked(block.module, names), {"alpha": alpha})
        return outcomes


def scales(largest: Tensor, W: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (eq. 4), and 1 where a channel is dead.

    Args:
        largest: max|X_j|, (in,).
        W: (out, in).
        alpha: 0 to 1.
    """
    weights = W.abs().amax(0)
    s = largest.pow(alpha) / weights.clamp(min=1e-5).pow(1 - alpha)
    return torch.where((largest > 0) & (weights > 0), s.clamp(min=1e-5), torch.ones_like(s))


@dataclass
class _InputMaxima:
    """Statistics of the input X of a tap.

    Attributes:
        largest: max|X_j|, (in,).
        sample: (tokens, in), some rows of X.
    """

    largest: Tensor
    sample: Tensor


def _observe(block: Block, taps: Sequence[Tap], tokens: int) -> dict[Tap, _InputMaxima]:
    inputs: dict[Tap, _InputMaxima] = {}
    count = max(1, block.stream.hidden.shape[0] * block.stream.hidden.shape[1])
    for tap, x in block.inputs(taps):
        x = x.reshape(-1, x.shape[-1])
        largest = x.abs().amax(0).float()
        rows = x[:: max(1, count // max(1, tokens))].float() if tokens else x[:0].float()
        old = inputs.get(tap)
        if old is None:
            inputs[tap] = _InputMaxima(largest, rows)
        else:
            inputs[tap] = _InputMaxima(torch.maximum(old.largest, largest), torch.cat([old.sample, rows]))
    return inputs


def _search(W: Tensor, x: Tensor, largest: Tensor, under: Scheme, steps: int = 20) -> float:
    """Return the alpha of least output error ||Q(x / s) Q(W s)^T - x W^T||^2 among steps + 1 from 0 to 1.

    Args:
        W: (out, in).
        x: (tokens, in).
        largest: max|X_j|, (in,).
        under: the scheme.
        steps: number of intervals.
    """
    acts = under.input_activations
    assert acts is not None
    expected = x @ W.T
    errors = []
    for alpha in torch.linspace(0, 1, steps + 1).tolist():
        s = scales(largest, W, alpha)
        weight = quantize(under.weights, W * s, under.weights.fit(W * s)).decode()
        errors.append(float((round_activations(x / s, acts, {}) @ weight.T - expected).square().sum()))
    return errors.index(min(errors)) / steps
