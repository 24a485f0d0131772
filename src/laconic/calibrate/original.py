"""A block of the original model, beside the one that is being compressed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import advance
from laconic.calibrate.stream import Room, Stream
from laconic.structure.anatomy import BlockCall


@dataclass
class Original:
    """stream: what the block reads in the original model. room: for what it puts out, while what it reads is kept.
    column_scales: what the columns of linears were
    multiplied by in the block that is compressed, by name within it."""

    module: nn.Module
    call: BlockCall
    stream: Stream
    device: torch.device
    room: Room
    column_scales: dict[str, Tensor] = field(default_factory=dict)
    _output: Stream | None = None

    def output(self, *, read_again: bool) -> Stream:
        """What the block puts out. read_again: whether a later stage looks into the block, which then still needs what
        it reads; if none does, the output takes its place."""
        if self._output is None:
            self._output = self.room.copy_of(self.stream) if read_again else self.stream
            advance(self.module, self.call, self._output, self.device)
        return self._output

    def finish(self) -> None:
        """Leave in the stream what the block puts out, for the next."""
        made = self.output(read_again=False)
        if made is not self.stream:
            self.stream.hidden.copy_(made.hidden)
