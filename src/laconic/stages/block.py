"""Stages that treat a decoder block as a whole, and their input, a block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import no_tokens_error
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.formats import ScalarFormat
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import Activations, Scheme
from laconic.solvers.moments import non_finite_error
from laconic.stages.linear import Outcome, WeightStage
from laconic.stages.stage import Needs, Scope
from laconic.structure.anatomy import Tap, linear_at
from laconic.structure.calls import BlockCall, Samples
from laconic.structure.experts import calibrate_all_experts
from laconic.structure.links import Link, fold


@dataclass(frozen=True)
class Stack:
    """Linears of one tap that are compressed as the rows of one matrix.

    Attributes:
        linears: their names within the block.
        scheme: how they will be stored; None for a stage that leaves dense weights.
    """

    linears: tuple[str, ...]
    scheme: Scheme | None

    @property
    def format(self) -> ScalarFormat:
        """The scalar format of the weights."""
        assert self.scheme is not None
        return as_scalar(self.scheme.weights)


@dataclass(frozen=True)
class Block:
    """One decoder block, the arguments that it is called with, and the calibration set before it.

    Attributes:
        module: the block; dense, but for linears that earlier stages have quantized.
        name: in the model.
        taps: all taps of the block, in order of execution.
        schemes: of the linears that the stage targets, by name within the block; None for a stage that leaves dense
            weights.
        links: of the taps that have one.
        call: how the block is called.
        stream: hidden states before the block.
        original_output: hidden states after the block in the original model, if the stage needs cross moments.
        device: where to compute.
        dtype: in which parameters are stored.
        stacks_linears: whether the stage takes linears of one tap together.
        advance: whether observing replaces the stream by the block's output.
        column_scales: what the columns of linears were multiplied by so far, by name.
        all_experts: whether experts are observed on every token.
        tokens: how many each observed tap has read.
    """

    module: nn.Module
    name: str
    taps: Sequence[Tap]
    schemes: Mapping[str, Scheme | None]
    links: Mapping[Tap, Link]
    call: BlockCall
    stream: Stream
    original_output: Stream | None
    device: torch.device
    dtype: torch.dtype
    stacks_linears: bool = True
    advance: bool = False
    column_scales: dict[str, Tensor] = field(default_factory=dict)
    all_experts: bool = False
    tokens: dict[Tap, int] = field(default_factory=dict)

    def inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """Yield taps and the inputs (..., in) of their linears, batch by batch.

        To be called once, before anything is changed: the stream may hold the block's output afterwards.

        Args:
            taps: some of the block's taps.

        Raises:
            ValueError: for NaN or infinity; and, at the end, for an expert to which no token was routed.
        """
        # Only while they are observed: what a stage runs and tunes follows the router.
        with calibrate_all_experts(*[self.module] * self.all_experts):
            yield from self._inputs(taps)
        self._check_tokens(taps)

    def count_tokens(self) -> None:
        """Count the tokens that the targeted linears read, for a stage that learns from the router's choice.

        Raises:
            ValueError: as `inputs` does; but where experts are observed on every token, none need be routed to them.
        """
        taps = self.targeted_taps()
        if not any(tap.experts for tap in taps):
            # All tokens; values that are not finite show in the first error.
            self.tokens.update(dict.fromkeys(taps, self.stream.hidden.shape[0] * self.stream.hidden.shape[1]))
            return
        for _ in self._inputs(taps):
            pass
        if not self.all_experts:
            self._check_tokens(taps)

    def _inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        self.tokens.update(dict.fromkeys(taps, 0))
        with Passes(self.module, self.taps, self.call, self.stream, self.device, resume=False) as passes:
            for tap, x in passes.inputs_and_advance(taps) if self.advance else passes.inputs(taps):
                if not torch.isfinite(x).all():
                    raise non_finite_error()
                self.tokens[tap] += x.numel() // x.shape[-1]
                yield tap, x

    def _check_tokens(self, taps: Sequence[Tap]) -> None:
        for tap in taps:
            if not self.tokens[tap]:
                raise no_tokens_error(f"{self.name}.{tap.linears[0]}")

    def fold(self, link: Link, s: Tensor) -> Tensor:
        """Move scales through a link, and record them for later comparisons with the original model.

        Args:
            link: between the linears whose columns are multiplied and what feeds them.
            s: the scales, (in,).

        Returns:
            What each column was multiplied by, (in,), as `structure.links.fold`.
        """
        columns = fold(self.module, link, s)
        scales = self.column_scales
        scales.update({n: scales[n] * columns if n in scales else columns for n in link.readers})
        return columns

    def targets(self, tap: Tap) -> list[str]:
        """Return the targeted linears of a tap, by name within the block.

        Args:
            tap: of the block.
        """
        return [n for n in tap.linears if n in self.schemes]

    def targeted_taps(self) -> list[Tap]:
        """Return the taps with targeted linears."""
        return [tap for tap in self.taps if self.targets(tap)]

    def stacks(self, tap: Tap) -> list[Stack]:
        """Return the targeted linears of a tap as they can be compressed together.

        Args:
            tap: of the block.
        """
        return stacks(self.module, {n: self.schemes[n] for n in self.targets(tap)}, together=self.stacks_linears)

    def format(self, linear: str) -> ScalarFormat:
        """Return the scalar format of a targeted linear.

        Args:
            linear: its name within the block.
        """
        scheme = self.schemes[linear]
        assert scheme is not None
        return as_scalar(scheme.weights)

    def dynamic_activations(self) -> dict[str, Activations | None]:
        """Return how the inputs of the targeted linears are quantized, where each input sets its own parameters."""
        acts = {n: scheme.input_activations if scheme else None for n, scheme in self.schemes.items()}
        return {n: a if a and not a.calibrated else None for n, a in acts.items()}

    def run(self, samples: Samples, module: nn.Module | None = None) -> Tensor:
        """Return the block's output (samples, tokens, hidden) for samples of the stream, on the block's device.

        Args:
            samples: their numbers.
            module: runs in place of the block, such as a changed copy.
        """
        return self.call(module or self.module, self.stream.hidden[samples].to(self.device), samples)

    def sample(self, tokens: int) -> Tensor:
        """Return the numbers of evenly spaced samples of the stream, at least one.

        Args:
            tokens: number of tokens in all samples together, about.
        """
        hidden = self.stream.hidden
        count = max(1, min(len(hidden), tokens // hidden.shape[1]))
        return torch.linspace(0, len(hidden) - 1, count).long()


class BlockStage(WeightStage):
    """A stage that treats decoder blocks as wholes."""

    scope: ClassVar[Scope] = "block"

    @property
    def needs(self) -> Needs:
        return Needs(activations=True)

    def check(self, taps: Mapping[Tap, int], links: Mapping[Tap, Link]) -> None:
        """Check that the stage can treat a block.

        Args:
            taps: those with targeted linears, and the width of their input.
            links: of the block.

        Raises:
            ValueError: if it cannot; the message names the fix.
        """

    @abstractmethod
    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        """Compress the targeted linears of a block.

        Dense weights may be changed in place as long as the block computes the same function.

        Args:
            block: with the calibration set before it.

        Returns:
            The outcomes by the names of linears within the block: linears that were stacked have one.

        Raises:
            ValueError: if the block cannot be compressed, such as for activations that hold NaN or infinity.
        """


def stacks(module: nn.Module, linears: Mapping[str, Scheme | None], *, together: bool = True) -> list[Stack]:
    """Group linears that read one input into those that can be compressed as the rows of one matrix.

    Linears of one scheme go together, unless something that shares parameters would reach from one into the next.

    Args:
        module: that holds them.
        linears: their schemes, by name within the module.
        together: whether more than one may go together at all.

    Returns:
        The stacks, their linears in the order of `linears` among those of one scheme.
    """
    by_scheme: dict[Scheme | None, list[str]] = {}
    for name, scheme in linears.items():
        by_scheme.setdefault(scheme, []).append(name)
    result: list[Stack] = []
    for names in by_scheme.values():
        scheme = linears[names[0]]
        unit = scheme.weights.row_unit if scheme else 1
        separable = unit is not None and not any(linear_at(module, n).out_features % unit for n in names)
        if together and separable:
            result.append(Stack(tuple(names), scheme))
        else:
            result += [Stack((n,), linears[n]) for n in names]
    return result


def stacked(module: nn.Module, linears: Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights of linears that read one input as one matrix (out, in), in new memory.

    Args:
        module: that holds the linears.
        linears: their names within the module, in the order of their rows.
        dtype: of the matrix.
    """
    return torch.cat([linear_at(module, n).weight.detach().to(dtype) for n in linears])
