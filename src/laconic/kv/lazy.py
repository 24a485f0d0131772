"""Keys and values that are decoded at the first operation that reads them.

A cache returns them to attention. Our attention function (`kv.attention_interface`) reads the packed tokens behind
them; for all other code they are plain tensors, so that a model needs no change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from laconic.kv.packed import KeysValues, LayerHistory


class LazyHistory:
    """Keys and values that attention may read in one forward pass, packed and decoded.

    Args:
        layer: The packed history.
        decode: Returns all its keys and values in 16 bit.
    """

    def __init__(self, layer: LayerHistory, decode: Callable[[], KeysValues]) -> None:
        self.layer, self._decode = layer, decode

    @cached_property
    def decoded(self) -> KeysValues:
        """Keys and values, (B, H, T, C) each, decoded at the first access."""
        return self._decode()


class LazyTensor(Tensor):
    """The keys (`which` 0) or the values (`which` 1) of a history, as a tensor (B, H, T, C)."""

    history: LazyHistory
    which: int

    @staticmethod
    def __new__(cls, history: LazyHistory, which: int, tokens: int, like: Tensor) -> LazyTensor:
        """Make a tensor of `tokens` tokens, with the other sizes, dtype and device of the new tokens `like`."""
        shape = (*like.shape[:2], tokens, like.shape[3])
        lazy: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        lazy.history, lazy.which = history, which
        return lazy

    def decoded(self) -> Tensor:
        """Return the plain tensor."""
        return self.history.decoded[self.which]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute every operation on the plain tensors."""
        args, kwargs = tree_map(lambda x: x.decoded() if isinstance(x, LazyTensor) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
