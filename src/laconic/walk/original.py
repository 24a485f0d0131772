"""A block of the original model, run beside the block that is compressed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import advance_stream
from laconic.calibrate.stream import Stream, StreamStorage
from laconic.structure.calls import BlockCall


@dataclass
class Original:
    """A block of the original model and the original model's activations before it.

    Attributes:
        module: the block.
        call: how it is called.
        stream: hidden states before the block in the original model.
        device: where to compute.
        storage: for the block's output, while its input is still needed.
        column_scales: what the columns of linears were multiplied by in the compressed block, by name within it.
    """

    module: nn.Module
    call: BlockCall
    stream: Stream
    device: torch.device
    storage: StreamStorage
    column_scales: dict[str, Tensor] = field(default_factory=dict)
    _output: Stream | None = None

    def output(self, *, keep_input: bool) -> Stream:
        """Return the block's output, computed once.

        Args:
            keep_input: whether a later stage observes the linears of the block, and so needs its input; otherwise the
                output takes the place of the input.
        """
        if self._output is None:
            self._output = self.storage.copy(self.stream) if keep_input else self.stream
            advance_stream(self.module, self.call, self._output, self.device)
        return self._output

    def advance(self) -> None:
        """Replace the stream's hidden states by the block's output, for the next block."""
        output = self.output(keep_input=False)
        if output is not self.stream:
            self.stream.hidden.copy_(output.hidden)
