"""Forward passes of the calibration set through one block, one per batch, that halt at the taps.

True-sequential calibration observes a linear after the earlier linears of its block are compressed. With halted passes
that takes one forward pass per batch: each pass halts before the first linear of a tap until the tap is compressed, and
then resumes with the compressed linears. Where memory does not suffice for halted passes, they start again for every
round of taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from laconic.calibrate.stream import Stream
from laconic.structure.anatomy import Tap
from laconic.structure.calls import BlockCall
from laconic.structure.hooks import patched_forwards


@dataclass
class _Pass:
    """The forward pass of one batch.

    Attributes:
        batch: hidden states before the block, a view into the stream.
        samples: numbers of the samples of the batch.
        run: the running pass; None before it starts.
        halt: the tap before which the pass halts, and the input of the tap's linears.
        output: hidden states after the block, once the pass has ended.
    """

    batch: Tensor
    samples: slice
    run: greenlet | None = None
    halt: tuple[Tap, Tensor] | None = None
    output: Tensor | None = None

    def reset(self) -> None:
        """Abandon the pass, and free the memory that it holds."""
        if self.run is not None and not self.run.dead:
            self.run.throw(GreenletExit)
        self.run = self.halt = self.output = None


@dataclass
class Passes:
    """The forward passes of all batches through one block.

    Linears of the block may be replaced or changed while passes halt before them. To be used as a context manager.

    Attributes:
        block: the block.
        taps: where passes halt, in order of execution.
        call: how the block is called.
        stream: hidden states before the block.
        device: where to compute.
        resume: whether halted passes stay in memory and resume in the next round; otherwise they start again.
    """

    block: nn.Module
    taps: Sequence[Tap]
    call: BlockCall
    stream: Stream
    device: torch.device
    resume: bool
    _passes: list[_Pass] = field(init=False)
    _halt_taps: frozenset[Tap] = field(init=False)
    _order: Mapping[Tap, int] = field(init=False)
    _patches: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._passes = [_Pass(batch, samples) for samples, batch in self.stream.numbered_batches()]
        self._order = {tap: i for i, tap in enumerate(self.taps)}
        self._halt_taps = frozenset(self.taps)
        forwards = [(self.block.get_submodule(tap.linears[0]), self._halting_forward(tap)) for tap in self.taps]
        self._patches.enter_context(patched_forwards(forwards))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """Yield taps and inputs (..., in) of their linears, batch by batch; passes halt before the last of the taps.

        A pass yields nothing for a tap that it does not reach: an expert to which no token was routed.

        Args:
            taps: at least one of the block's; where halted passes resume, none that an earlier call has passed.
        """
        last = max(self._order[tap] for tap in taps)
        for batch in self._passes:
            if not self.resume:
                self._halt_taps = frozenset(taps)
                batch.reset()
            yield from self._run_to(batch, taps, last)
            if not self.resume:
                batch.reset()

    def inputs_and_advance(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """Yield as `inputs` does, and replace the stream's hidden states by the block's output.

        Args:
            taps: some of the block's taps.
        """
        for batch in self._passes:
            yield from self._run_to(batch, taps, len(self.taps))
            self._advance(batch)

    def finish(self) -> None:
        """Run all passes to their end, and replace the stream's hidden states by the block's output."""
        for batch in self._passes:
            if not self.resume:
                self._halt_taps = frozenset()
                batch.reset()
            self._advance(batch)

    def close(self) -> None:
        """Abandon all passes, and restore the forwards of the block's linears."""
        for batch in self._passes:
            batch.reset()
        self._patches.close()

    def _advance(self, batch: _Pass) -> None:
        while batch.output is None:
            self._run_to_halt(batch)
        batch.batch.copy_(batch.output)
        batch.reset()

    def _run_to(self, batch: _Pass, taps: Sequence[Tap], last: int) -> Iterator[tuple[Tap, Tensor]]:
        if batch.run is None:
            self._run_to_halt(batch)
        while batch.halt is not None and self._order[batch.halt[0]] <= last:
            if batch.halt[0] in taps:
                yield batch.halt
            if self._order[batch.halt[0]] == last:
                return
            self._run_to_halt(batch)

    def _run_to_halt(self, batch: _Pass) -> None:
        """Start or resume a pass; it runs until it halts at the next tap, or ends."""
        if batch.run is None:
            batch.run = greenlet(lambda: self.call(self.block, batch.batch.to(self.device), batch.samples))
        result: Any = batch.run.switch()
        if batch.run.dead:
            batch.halt, batch.output = None, result
        else:
            batch.halt = result

    def _halting_forward(self, tap: Tap) -> Callable[[Tensor], Any]:
        name = tap.linears[0]

        def forward(x: Tensor) -> Any:
            if tap in self._halt_taps:
                getcurrent().parent.switch((tap, x))
            # Looked up after the halt: the linear may have been replaced meanwhile.
            linear = self.block.get_submodule(name)
            return type(linear).forward(linear, x)

        return forward
