"""What a block stage is given: one decoder block, what it is called with, and the calibration set before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import no_tokens
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.formats.schemes import Scheme
from laconic.solvers.moments import non_finite_error
from laconic.structure.anatomy import BlockCall, Tap, linear_at
from laconic.structure.experts import calibrate_all_experts
from laconic.structure.links import Link, fold


@dataclass(frozen=True)
class Block:
    """module: the block, dense. name: in the model. taps: all of its taps, in order of execution. targeted: the linears
    that the stage means, by name within the block. links: of the taps that have one. stream: what the block reads.
    original_output: what the block puts out in the original model, where the stage asked for that (`cross`).
    dtype: in which parameters are stored. through: whether the stream is passed on while it is observed. moved: what
    the columns of linears were multiplied by so far, by name. all_experts: whether experts are observed on every token.
    tokens: how many each tap that was observed read."""

    module: nn.Module
    name: str
    taps: Sequence[Tap]
    targeted: frozenset[str]
    links: Mapping[Tap, Link]
    call: BlockCall
    stream: Stream
    original_output: Stream | None
    device: torch.device
    dtype: torch.dtype
    through: bool = False
    moved: dict[str, Tensor] = field(default_factory=dict)
    all_experts: bool = False
    tokens: dict[Tap, int] = field(default_factory=dict)

    def inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """What the linears of these taps read, batch by batch. To be asked for once, before anything is changed: the
        stream may hold the block's output after.

        Raises: ValueError for NaN or infinity; and, at the end, for an expert to which no token was routed.
        """
        # Only while they are observed: what a stage runs, tunes and compares is what the router chooses.
        with calibrate_all_experts(*[self.module] * self.all_experts):
            yield from self._inputs(taps)
        self._check_tokens(taps)

    def count(self) -> None:
        """See how many tokens the targeted linears read, for a stage that learns from what the router sends them.

        Raises: as `inputs` does; but where experts were to be shown every token, none is asked of the router.
        """
        taps = self.targeted_taps()
        if not any(tap.experts for tap in taps):
            # All of them; what is not finite shows in the first error.
            self.tokens.update(dict.fromkeys(taps, self.stream.hidden.shape[0] * self.stream.hidden.shape[1]))
            return
        for _ in self._inputs(taps):
            pass
        if not self.all_experts:
            self._check_tokens(taps)

    def _inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        self.tokens.update(dict.fromkeys(taps, 0))
        with Passes(self.module, self.taps, self.call, self.stream, self.device, held=False) as passes:
            for tap, x in passes.through(taps) if self.through else passes.inputs(taps):
                if not torch.isfinite(x).all():
                    raise non_finite_error()
                self.tokens[tap] += x.numel() // x.shape[-1]
                yield tap, x

    def _check_tokens(self, taps: Sequence[Tap]) -> None:
        for tap in taps:
            if not self.tokens[tap]:
                raise no_tokens(f"{self.name}.{tap.linears[0]}")

    def fold(self, link: Link, s: Tensor) -> Tensor:
        """Move scales through a link, as `structure.links.fold`, and remember them: what its readers read is no longer
        in the scale of the original model."""
        columns = fold(self.module, link, s)
        self.moved.update({n: self.moved[n] * columns if n in self.moved else columns for n in link.readers})
        return columns

    def targets(self, tap: Tap) -> list[str]:
        """The targeted linears of a tap."""
        return [n for n in tap.linears if n in self.targeted]

    def targeted_taps(self) -> list[Tap]:
        """Taps with targeted linears."""
        return [tap for tap in self.taps if self.targets(tap)]

    def run(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """The block's output for some samples (samples, tokens, hidden)."""
        return self.call(module or self.module, hidden.to(self.device))

    def some(self, tokens: int) -> Tensor:
        """Evenly spaced samples of what the block reads, at least one, about `tokens` tokens in all."""
        hidden = self.stream.hidden
        count = max(1, min(len(hidden), tokens // hidden.shape[1]))
        return hidden[torch.linspace(0, len(hidden) - 1, count).long()]


def stacks(module: nn.Module, linears: Sequence[str], scheme: Scheme | None) -> Iterator[tuple[str, ...]]:
    """Which linears of a tap can be stacked: all, unless a tile of the format would reach from one into the next."""
    structure = scheme.weights.tiling.block_structure if scheme else None
    if structure and any(linear_at(module, n).out_features % structure[0] for n in linears):
        yield from ((n,) for n in linears)
    elif linears:
        yield tuple(linears)


def stacked(module: nn.Module, linears: Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of some linears that read one tensor, their rows together: (out, in), in new memory."""
    return torch.cat([linear_at(module, n).weight.detach().to(dtype) for n in linears])
