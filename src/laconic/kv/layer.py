"""One layer of a quantized cache.

Tokens stay in 16 bit until they leave the recent window, and are then encoded, once: history is never rounded again. A
layer gives attention the packed tokens, decoded, followed by the window. The new tokens of a forward pass are encoded
after it, so they attend to one another exactly.

Axes: B sequences, H key-value heads, N new tokens, T cached tokens, W tokens of the window, S sinks, C channels. A
*column* is a place along T, padding included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from laconic.kv.format import StaticParams
from laconic.kv.lazy import LazyHistory, LazyTensor
from laconic.kv.packed import (
    MAX_QUERIES,
    KeysValues,
    LayerHistory,
    PackedGroup,
    PackedTokens,
    kernel_reads_layer,
)
from laconic.kv.positions import TokenPositions
from laconic.kv.scheme import ROTATIONS, HeadGroup, KvScheme, tokens_at_once
from laconic.kv.stored import StoredPair, cut_tokens, decode_groups, encode_groups, join_tokens, map_tensors
from laconic.solvers.rotate import layer_rotations, rotate


class KvCacheLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        keys: Keys of the recent window, (B, H, W, C).
        values: Values of the recent window.
        stored: Encoded keys and values of each group of heads.
        encoded: Number of encoded tokens.
        offset: Column of the first token in the layer; earlier ones have left the sliding window.
        length: Number of tokens, those that have left the sliding window included.
        sinks: First tokens of every row in 16 bit.

    Args:
        scheme: Scheme of the cache.
        number: Number of the layer.
        positions: Positions of the tokens, shared by all layers of the cache.
        static: Static parameters of `keys.G` and `values.G`, G the number of the group of heads, and rotations.
        sliding_window: Number of tokens that a token attends to; None for all.
        lazy: Whether the model's attention reads packed tokens, so that it gets lazy tensors.
    """

    is_croppable = True
    is_compileable = False
    keys: Any
    values: Any

    def __init__(
        self,
        scheme: KvScheme,
        number: int,
        *,
        positions: TokenPositions,
        static: Mapping[str, StaticParams],
        sliding_window: int | None,
        lazy: bool,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scheme, self.number, self.positions, self.static = scheme, number, positions, static
        self.sliding_window, self.lazy = sliding_window, lazy
        self.groups: Sequence[HeadGroup] = scheme.layers[number]
        self.unit = tokens_at_once(self.groups)
        self.is_sliding = sliding_window is not None
        self._clear()

    def _clear(self) -> None:
        self.stored: list[StoredPair] = []
        self.offset = self.encoded = self.length = 0
        self.sinks: KeysValues | None = None
        self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first tokens.

        Args:
            key_states: (B, H, N, C).
            value_states: (B, H, N, C).

        Raises:
            ValueError: The formats cannot store heads of this many channels.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.channels, self.heads = key_states.shape[-1], key_states.shape[1]
        self.static = {name: {n: t.to(self.device) for n, t in params.items()} for name, params in self.static.items()}
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        channels = self.channels, value_states.shape[-1]
        rotations = layer_rotations(self.scheme.rotation, self.static.get(ROTATIONS, {}), channels)
        self.rotations = rotations and (rotations[0].to(self.device), rotations[1].to(self.device))
        for group in self.groups:
            group.keys.check(self.channels)
            group.values.check(value_states.shape[-1])
        same_channels = value_states.shape[-1] == self.channels
        self.lazy = self.lazy and same_channels and kernel_reads_layer(self.scheme, self.groups, self.channels)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """Add new tokens, and return keys and values of all tokens that they may attend to.

        Args:
            key_states: (B, H, N, C).
            value_states: (B, H, N, C).
            *args: Unused; transformers passes them to every layer.
            **kwargs: Unused; transformers passes them to every layer.

        Returns:
            Keys and values, each (B, H, T, C) in the model's dtype; lazy tensors where the kernel reads them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self._keep_sinks(key_states, value_states)
        self.length += new
        visible: KeysValues
        if self.lazy and self.encoded and new <= MAX_QUERIES and not key_states.requires_grad:
            # `_encode_left_window` makes new tensors and never changes old ones, so a shallow copy stays as it is.
            history = LazyHistory(self._history(new), partial(copy.copy(self)._visible, new))
            tokens = self.token_count
            if self.sliding_window is not None:
                tokens = min(tokens, self.sliding_window - 1 + new)
            visible = LazyTensor(history, 0, tokens, key_states), LazyTensor(history, 1, tokens, value_states)
        else:
            visible = self._visible(new)
        self._encode_left_window()
        self._forget_out_of_window()
        return visible

    # --- history that attention reads ---

    def _history(self, new: int) -> LayerHistory:
        """Return the tokens that the last `new` tokens attend to, packed."""
        groups = []
        for g, (group, (keys, values)) in enumerate(zip(self.groups, self.stored, strict=True)):
            packed_keys = PackedTokens(group.keys, keys, self.static.get(f"keys.{g}"))
            packed_values = PackedTokens(group.values, values, self.static.get(f"values.{g}"))
            groups.append(PackedGroup(group.heads, packed_keys, packed_values))
        angles = None
        if self.scheme.pre_rope:
            angles = self.positions.angles(self.offset, self.encoded, self.device, self.number)
        return LayerHistory(
            heads=self.heads,
            new=new,
            groups=tuple(groups),
            window=(self.keys, self.values),
            sinks=self.sinks,
            first_B=self._first_visible(),
            angles=angles,
            rotations=self.rotations,
            sliding=self.sliding_window is not None,
            only_padding=self.positions.only_padding,
        )

    def _first_visible(self) -> Tensor | None:
        """Return the first column that the newest token of each row attends to, (B,), counted from `offset`.

        None where every row attends to all tokens in the layer.
        """
        out_of_window = 0 if self.sliding_window is None else self.length - self.sliding_window
        if self.positions.padding is None and out_of_window <= self.offset:
            return None
        first_B = self.positions.first_columns(self.keys.shape[0], self.device).clamp(min=out_of_window)
        return (first_B - self.offset).clamp(min=0)

    def _visible(self, new: int) -> KeysValues:
        """Return keys and values that the last `new` tokens may attend to, decoded."""
        keys, values = self._all_tokens()
        if self.sliding_window is None:
            return keys, values
        visible = self.sliding_window - 1 + new
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _all_tokens(self) -> KeysValues:
        if not self.encoded:
            return self.keys, self.values
        keys_BHTC, values_BHTC = self._decode()
        if self.sinks is not None:
            self._put_sinks(keys_BHTC, values_BHTC)
        return torch.cat([keys_BHTC, self.keys], 2), torch.cat([values_BHTC, self.values], 2)

    # --- encoding and decoding ---

    def _encode_left_window(self) -> None:
        """Encode, in whole units, the tokens that have left the recent window."""
        surplus = self.keys.shape[2] - self.scheme.residual_length
        count = max(0, surplus) // self.unit * self.unit
        if not count:
            return
        keys, values = self._to_stored_form(self.keys[:, :, :count], self.values[:, :, :count])
        new = encode_groups(self.groups, keys, values, self.static, self.dtype)
        self.stored = [join_tokens(*pairs) for pairs in zip(self.stored, new, strict=True)] if self.stored else new
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        self.encoded += count

    def _forget_out_of_window(self) -> None:
        """Remove, in whole units, the tokens that no later token can attend to."""
        if self.sliding_window is None:
            return
        invisible = (self.length - self.sliding_window + 1 - self.offset) // self.unit * self.unit
        if (count := min(invisible, self.encoded)) > 0:
            self.stored = [cut_tokens(pair, self.encoded, count, self.encoded) for pair in self.stored]
            self.offset += count
            self.encoded -= count

    def _decode(self) -> KeysValues:
        """Decode all encoded tokens: (B, H, T, C) in the model's dtype."""
        channels = int(self.keys.shape[-1]), int(self.values.shape[-1])
        return self._from_stored_form(*decode_groups(self.groups, self.stored, self.static, channels))

    def _to_stored_form(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Remove the rotary embedding of keys, and rotate keys and values, as the scheme requires."""
        start = self.offset + self.encoded
        if self.scheme.pre_rope:
            keys = self.positions.remove_rotary(keys.float(), start, self.number)
        if self.rotations:
            keys, values = rotate(keys.float(), self.rotations[0]), rotate(values.float(), self.rotations[1])
        return keys, values

    def _from_stored_form(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Invert `_to_stored_form`, for all encoded tokens."""
        if self.rotations:
            keys, values = rotate(keys, self.rotations[0].mT), rotate(values, self.rotations[1].mT)
        if self.scheme.pre_rope:
            keys = self.positions.apply_rotary(keys, self.offset, self.number)
        return keys.to(self.dtype), values.to(self.dtype)

    # --- sinks ---

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Copy the first tokens of every row, wherever its padding ends."""
        count = 0 if self.sliding_window is not None else self.scheme.sinks
        if not count:
            return
        if self.sinks is None:
            empty = [x.new_zeros(*x.shape[:2], count, x.shape[-1]) for x in (keys, values)]
            self.sinks = empty[0], empty[1]
        columns_BS = self._sink_columns(count)
        new = (columns_BS >= self.length) & (columns_BS < self.length + keys.shape[2])
        rows, which = new.nonzero(as_tuple=True)
        for sinks, x in zip(self.sinks, (keys, values), strict=True):
            sinks[rows, :, which] = x[rows, :, columns_BS[rows, which] - self.length]

    def _put_sinks(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> None:
        """Replace decoded first tokens by the exact ones."""
        assert self.sinks is not None
        columns_BS = self._sink_columns(self.sinks[0].shape[2])
        rows, which = (columns_BS < self.encoded).nonzero(as_tuple=True)
        for sinks, x in zip(self.sinks, (keys_BHTC, values_BHTC), strict=True):
            x[rows, :, columns_BS[rows, which]] = sinks[rows, :, which]

    def _sink_columns(self, count: int) -> Tensor:
        first_B = self.positions.first_columns(self.keys.shape[0], self.keys.device)
        return first_B[:, None] + torch.arange(count, device=self.keys.device)

    # --- interface of transformers ---

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that attention gets.

        Args:
            query_length: Number of new tokens.
        """
        if self.sliding_window is None:
            return self.length + query_length, 0
        window = self.sliding_window
        return min(self.length, window - 1) + query_length, max(self.length - window + 1, 0)

    def get_seq_length(self) -> int:
        """Return the number of tokens, those that have left a sliding window included."""
        return self.length

    def get_max_length(self) -> int:
        """Return the size of the sliding window; -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: Their number; transformers gives it below zero.

        Raises:
            RuntimeError: A sliding window would need tokens that are already removed.
        """
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        window = self.sliding_window
        if window is not None and self.length - count - window + 1 < self.offset and self.offset:
            raise RuntimeError(
                f"cannot crop {count} tokens: the tokens of the sliding window before them are forgotten; use a new "
                "cache, or one without a sliding window"
            )
        self.length -= count
        in_window = self.keys.shape[2]
        if count <= in_window:
            self.keys, self.values = self.keys[:, :, : in_window - count], self.values[:, :, : in_window - count]
            return
        left = self.encoded - (count - in_window)
        whole = left // self.unit * self.unit
        # A unit is encoded as a whole: if the crop cuts into one, the rest of its tokens go back to the window.
        keys, values = self._decode()
        self.keys, self.values = keys[:, :, whole:left].clone(), values[:, :, whole:left].clone()
        self.stored = [cut_tokens(pair, self.encoded, 0, whole) for pair in self.stored] if whole else []
        self.encoded = whole

    def reset(self) -> None:
        """Remove all tokens."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch.

        Args:
            beam_idx: (rows,) int64, the present row of each new one.
        """
        if self.is_initialized:
            self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch.

        Args:
            repeats: Number of copies of a row, side by side.
        """
        if self.is_initialized:
            self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch alone.

        Args:
            indices: (n,) int64, the rows.
        """
        if self.is_initialized:
            self._map(lambda t: t[indices.to(t.device), ...])

    def offload(self) -> None:
        """Move all tensors to the CPU."""
        if self.is_initialized:
            self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tensors back to the layer's device."""
        if self.is_initialized and self.keys.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.stored = [map_tensors(change, pair) for pair in self.stored]
        if self.sinks is not None:
            self.sinks = (change(self.sinks[0]), change(self.sinks[1]))

    # --- sizes ---

    def tensors(self) -> list[Tensor]:
        """Return all tensors that the layer stores."""
        encoded = [t for pair in self.stored for stored in pair for t in stored.values()]
        return [*encoded, *(self.sinks or ()), *([] if self.keys is None else [self.keys, self.values])]

    @property
    def token_count(self) -> int:
        """Number of tokens in the layer."""
        return self.length - self.offset

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None while there are no tokens."""
        return None if self.keys is None else int(self.keys.shape[0])

    @property
    def numbers_per_token(self) -> int:
        """Numbers of the keys of one token, over all rows and heads."""
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[1] * self.keys.shape[3]
