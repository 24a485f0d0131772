"""Rows and columns of a block's attention linears by head, found by shape."""

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
    """Heads of a block's attention.

    Attributes:
        count: Number of query heads.
        groups: Number of key-value heads.
        size: Channels of a head.
        rows: Linears whose rows are heads, by name within the block: the number of heads in their rows.
        output: Name of the linear whose columns are heads (o_proj).
        tap: Tap of the output linear.
    """

    count: int
    groups: int
    size: int
    rows: Mapping[str, int]
    output: str
    tap: Tap

    def protected(self, linear: str, heads: Set[int]) -> Tensor | None:
        """Make the mask of the rows or columns of a linear that belong to some query heads.

        Keys and values belong to every query head that reads them.

        Args:
            linear: Name of the linear within the block.
            heads: Numbers of the query heads.

        Returns:
            (rows, 1) or (1, columns) bool; None if the linear has no heads.
        """
        if linear == self.output:
            return self._channels(self.count, heads)[None]
        if linear not in self.rows:
            return None
        share = self.count // self.rows[linear]
        return self._channels(self.rows[linear], {h // share for h in heads})[:, None]

    def _channels(self, count: int, chosen: Set[int]) -> Tensor:
        return torch.tensor([i in chosen for i in range(count)]).repeat_interleave(self.size)


def find_heads(taps: Sequence[Tap], shapes: Mapping[str, tuple[int, int]], config: PreTrainedConfig) -> Heads:
    """Find the attention heads of a block by the shapes of its linears.

    Args:
        taps: Taps of the block, in order of execution.
        shapes: Shape (out, in) of each linear, by name within the block.
        config: Config of the model.

    Returns:
        The heads of the first tap whose linears are queries, keys and values, and of the linear after it.

    Raises:
        ValueError: Queries, keys and values are not separate linears of the shapes that the config describes.
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
    raise ValueError(
        f"the heads of '{config.model_type}' cannot be told apart: it has no linears of queries alone; leave "
        "protect out"
    )
