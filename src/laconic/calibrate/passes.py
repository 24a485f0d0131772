"""The calibration set on its way through one block: a forward pass a batch, each halted at the taps.

True-sequential calibration observes a linear after the earlier ones of its block are compressed. Halted passes make
that one forward pass a batch: each waits before a tap's first linear until the tap is compressed, and goes on through
what stands there then. Where the memory for waiting passes is not there, each round begins its passes anew.
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
from laconic.structure.anatomy import BlockCall, Tap
from laconic.structure.hooks import patched_forwards


@dataclass
class _Pass:
    """One batch in the block. at: the tap before which it waits, and what the tap's linears will read."""

    batch: Tensor
    run: greenlet | None = None
    at: tuple[Tap, Tensor] | None = None
    output: Tensor | None = None

    def end(self) -> None:
        """Give up what is not finished, and the memory that it holds."""
        if self.run is not None and not self.run.dead:
            self.run.throw(GreenletExit)
        self.run = self.at = self.output = None


@dataclass
class Passes:
    """taps: where passes halt, in order of execution. held: whether passes wait in memory, or begin anew each round.

    Linears of `block` may be replaced or changed while passes wait before them. Close it when done.
    """

    block: nn.Module
    taps: Sequence[Tap]
    call: BlockCall
    stream: Stream
    device: torch.device
    held: bool
    _passes: list[_Pass] = field(init=False)
    _halting: frozenset[Tap] = field(init=False)
    _order: Mapping[Tap, int] = field(init=False)
    _patches: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._passes = [_Pass(batch) for batch in self.stream.batches()]
        self._order = {tap: i for i, tap in enumerate(self.taps)}
        self._halting = frozenset(self.taps)
        halts = [(self.block.get_submodule(tap.linears[0]), self._halting_forward(tap)) for tap in self.taps]
        self._patches.enter_context(patched_forwards(halts))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inputs(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """What the linears of these taps read, batch by batch; passes halt before the last of the taps.

        A pass may miss a tap (an expert to which no token was routed).
        """
        last = max(self._order[tap] for tap in taps)
        for batch in self._passes:
            if not self.held:
                self._halting = frozenset(taps)
                batch.end()
            yield from self._run_to(batch, taps, last)
            if not self.held:
                batch.end()

    def through(self, taps: Sequence[Tap]) -> Iterator[tuple[Tap, Tensor]]:
        """The same, but each pass goes on to the end of the block at once, and its output replaces what the stream
        holds."""
        for batch in self._passes:
            yield from self._run_to(batch, taps, len(self.taps))
            self._pass_on(batch)

    def finish(self) -> None:
        """Let all passes run to their end, and replace the stream's hidden states by the block's output."""
        for batch in self._passes:
            if not self.held:
                self._halting = frozenset()
                batch.end()
            self._pass_on(batch)

    def close(self) -> None:
        """Give up all passes and leave the block's linears as they were."""
        for batch in self._passes:
            batch.end()
        self._patches.close()

    def _pass_on(self, batch: _Pass) -> None:
        while batch.output is None:
            self._go_on(batch)
        batch.batch.copy_(batch.output)
        batch.end()

    def _run_to(self, batch: _Pass, taps: Sequence[Tap], last: int) -> Iterator[tuple[Tap, Tensor]]:
        if batch.run is None:
            self._go_on(batch)
        while batch.at is not None and self._order[batch.at[0]] <= last:
            if batch.at[0] in taps:
                yield batch.at
            if self._order[batch.at[0]] == last:
                return
            self._go_on(batch)

    def _go_on(self, batch: _Pass) -> None:
        """Run a pass until it halts at the next tap or ends."""
        if batch.run is None:
            batch.run = greenlet(lambda: self.call(self.block, batch.batch.to(self.device)))
        reached: Any = batch.run.switch()
        if batch.run.dead:
            batch.at, batch.output = None, reached
        else:
            batch.at = reached

    def _halting_forward(self, tap: Tap) -> Callable[[Tensor], Any]:
        name = tap.linears[0]

        def forward(x: Tensor) -> Any:
            if tap in self._halting:
                getcurrent().parent.switch((tap, x))
            now = self.block.get_submodule(name)
            return type(now).forward(now, x)

        return forward
