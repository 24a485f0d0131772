"""Which rows and columns of a block's attention belong to which head, found by shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from laconic.structure.anatomy import Tap


@dataclass(frozen=True)
class Heads:
    """count: heads of queries, each of `size` channels, in `groups` that share a key and a value. rows: linears, by
    name in the block, and in how many heads or groups their rows are. output: the linear whose columns are heads';
    tap: its own."""

    count: int
    groups: int
    size: int
    rows: Mapping[str, int]
    output: str
    tap: Tap

    def protected(self, linear: str, heads: Set[int]) -> Tensor | None:
        """What of a linear is these heads': (rows, 1) or (1, columns) bool, None of one that has no heads. Keys and
        values go with any head that reads them."""
        if linear == self.output:
            return self._channels(self.count, heads)[None]
        if linear not in self.rows:
            return None
        share = self.count // self.rows[linear]
        return self._channels(self.rows[linear], {h // share for h in heads})[:, None]

    def _channels(self, count: int, chosen: Set[int]) -> Tensor:
        return torch.tensor([i in chosen for i in range(count)]).repeat_interleave(self.size)


def find_heads(taps: Sequence[Tap], shapes: Mapping[str, tuple[int, int]], config: PreTrainedConfig) -> Heads:
    """taps: of a block, in order of execution. shapes: (out, in) of its linears.

    Raises: ValueError where queries, keys and values are not linears of their own, or the shapes are others.
    """
    text = config.get_text_config()
    count = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or count
    size = getattr(text, "head_dim", None) or text.hidden_size // count
    for tap, after in pairwise(taps):
        rows = {n: count if shapes[n][0] == count * size else groups for n in tap.linears}
        outs = sorted(shapes[n][0] for n in tap.linears)
        follows = len(after.linears) == 1 and shapes[after.linears[0]][1] == count * size
        if outs == sorted([count * size, groups * size, groups * size]) and follows:
            return Heads(count, groups, size, rows, after.linears[0], after)
    raise ValueError(f"the heads of '{config.model_type}' cannot be told apart: it has no linears of queries alone")
