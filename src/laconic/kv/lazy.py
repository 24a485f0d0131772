"""Keys and values that nobody has decoded yet: what a cache hands to attention that may read them as they are stored.

To anything else they are plain tensors, decoded when first looked at. So a model need not say how it attends, and what
cannot read packed keys and values never has to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from laconic.kv.cache import PackedLayer


class History:
    """What attention may look at in one pass. layer: as it is in this pass, which nothing changes any more. new: how
    many tokens are new. decode: gives all keys and values, in 16 bit."""

    def __init__(self, layer: PackedLayer, new: int, decode: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.layer, self.new, self._decode = layer, new, decode

    @cached_property
    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, tokens, channels)."""
        return self._decode()


class Unread(Tensor):
    """The keys (which: 0) or values (1) of a history."""

    history: History
    which: int

    @staticmethod
    def __new__(cls, history: History, which: int, tokens: int, like: Tensor) -> Unread:
        """like: the new ones, (batch, heads, new tokens, channels)."""
        shape = (*like.shape[:2], tokens, like.shape[3])
        made: Unread = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.history, made.which = history, which
        return made

    def decoded(self) -> Tensor:
        """As a plain tensor."""
        return self.history.decoded[self.which]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is computed of it is computed of the plain tensor."""
        args, kwargs = tree_map(lambda x: x.decoded() if isinstance(x, Unread) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Unread(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
