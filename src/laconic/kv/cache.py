"""A quantized key-value cache for transformers: `model.generate(..., past_key_values=cache)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from laconic.kv.format import StaticParams
from laconic.kv.layer import KvCacheLayer
from laconic.kv.packed import KeysValues
from laconic.kv.positions import TokenPositions
from laconic.kv.scheme import KvScheme

StaticByLayer = Sequence[Mapping[str, StaticParams]]
"""Static parameters of each layer: of `keys.G` and `values.G`, G the number of the group of heads, and rotations."""


class KvCache(Cache):
    """The cache of one batch.

    Args:
        scheme: Scheme of the cache.
        positions: Positions of the tokens of its rows.
        static: Static parameters of each layer, where the scheme is calibrated.
        windows: Number of tokens that a token attends to in each layer (None: all); None for all in every layer.
        lazy: Whether the model's attention reads packed tokens, so that it gets lazy tensors.
    """

    def __init__(
        self,
        scheme: KvScheme,
        *,
        positions: TokenPositions,
        static: StaticByLayer | None = None,
        windows: Sequence[int | None] | None = None,
        lazy: bool = False,
    ) -> None:
        static = static or [{} for _ in scheme.layers]
        windows = windows or [None] * len(scheme.layers)
        self.quantized_layers = [
            KvCacheLayer(scheme, i, positions=positions, static=params, sliding_window=window, lazy=lazy)
            for i, (params, window) in enumerate(zip(static, windows, strict=True))
        ]
        super().__init__(layers=list(self.quantized_layers))
        self.scheme, self.positions = scheme, positions
        # Of the whole model, where the text part gets masks by type of layer.
        self.mask: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeysValues:
        """Add a layer's new tokens, and return keys and values of all tokens that they may attend to.

        Args:
            key_states: (batch, key-value heads, new tokens, channels).
            value_states: (batch, key-value heads, new tokens, channels).
            layer_idx: Number of the layer.
            *args: Other arguments of transformers' method.
            **kwargs: Other arguments of transformers' method.

        Returns:
            Keys and values, each (batch, key-value heads, visible tokens, channels) in the model's dtype; lazy tensors
            where the kernel reads them.

        Raises:
            ValueError: The tokens are of a layer that the cache does not have, or of another batch.
        """
        if layer_idx >= len(self.quantized_layers):
            raise ValueError(
                f"this cache has {len(self.quantized_layers)} layers and the model more, so it was made for another "
                "one; make one for each, by laconic.kv_cache"
            )
        rows = self.quantized_layers[layer_idx].rows
        if rows not in (None, key_states.shape[0]):
            raise ValueError(
                f"this cache holds {rows} texts and is given {key_states.shape[0]}; make a new one for each batch"
            )
        visible: KeysValues = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return visible

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; encoded tokens of a group that is cut into go back to the window, decoded.

        Args:
            tokens_to_remove: Their number, negative, as transformers counts them.

        Raises:
            ValueError: The number is positive, or the cache has fewer tokens.
            RuntimeError: A sliding window would need tokens that are already removed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to forget as a number below zero")
        if -tokens_to_remove > self.get_seq_length():
            raise ValueError(
                f"crop({tokens_to_remove}): the cache has {self.get_seq_length()} tokens; crop at most these"
            )
        super().crop(tokens_to_remove)
        self.positions.crop(self.get_seq_length())

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self.positions.crop(0)
        self.mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch.

        Args:
            beam_idx: (rows,) int64, the present row of each new one.
        """
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.positions.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch.

        Args:
            repeats: Number of copies of a row, side by side.
        """
        super().batch_repeat_interleave(repeats)
        self.positions.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch alone.

        Args:
            indices: (n,) int64, the rows.
        """
        super().batch_select_indices(indices)
        self.positions.select(indices)

    def stored_bytes(self) -> int:
        """Return the bytes of all stored tensors: codes, ranges, outliers, sinks, the window and positions."""
        return self.positions.nbytes + sum(t.nbytes for layer in self.quantized_layers for t in layer.tensors())

    def effective_bits(self) -> float:
        """Return the bits of all stored tensors per number of keys and values."""
        numbers = sum(2 * layer.token_count * layer.numbers_per_token for layer in self.quantized_layers)
        return 8 * self.stored_bytes() / max(1, numbers)
