"""A key-value cache that is stored in few bits, for transformers: `model.generate(..., past_key_values=cache)`.

Tokens wait in 16 bit until they leave the recent window, and are then encoded, once: history is never rounded again. A
layer gives attention what was stored, decoded, followed by the window. The new tokens of a forward pass see each other
exactly, since they are encoded after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from laconic.kv.attention import MOST_QUERIES, supports_layer
from laconic.kv.format import Static, Stored, decode_kv, encode_kv
from laconic.kv.lazy import History, Unread
from laconic.kv.positions import Places
from laconic.kv.scheme import HeadGroup, KvScheme, tokens_at_once
from laconic.solvers.rotate import turned, turns

Calibrated = Sequence[Mapping[str, Static]]
"""Of each layer what calibration fixed: of `keys.G` and `values.G`, G the number of the group of heads."""


class KvCache(Cache):
    """The cache of one sequence or batch. places: where the tokens of its rows are; windows: of each layer, how many
    tokens it attends to (None: all). unread: whether the model's attention reads packed tokens as they are."""

    def __init__(
        self,
        scheme: KvScheme,
        *,
        places: Places,
        calibrated: Calibrated | None = None,
        windows: Sequence[int | None] | None = None,
        unread: bool = False,
    ) -> None:
        fixed = calibrated or [{} for _ in scheme.layers]
        windows = windows or [None] * len(scheme.layers)
        self.packed = [
            PackedLayer(scheme, i, places, static, window, unread=unread)
            for i, (static, window) in enumerate(zip(fixed, windows, strict=True))
        ]
        super().__init__(layers=list(self.packed))
        self.scheme, self.places = scheme, places

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in a layer's new tokens (batch, heads, tokens, channels); return all that attention may look at.

        Raises: ValueError when they are of another model's layer, or of another batch.
        """
        if layer_idx >= len(self.packed):
            raise ValueError(
                f"this cache has {len(self.packed)} layers and the model more, so it was made for another one; make "
                "one for each, by laconic.kv_cache"
            )
        rows = self.packed[layer_idx].rows
        if rows not in (None, key_states.shape[0]):
            raise ValueError(
                f"this cache holds {rows} texts and is given {key_states.shape[0]}; make a new one for each batch"
            )
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so many below zero. What is cut out of an encoded group of tokens goes back to the
        window, decoded. Raises: ValueError for more than there are, or a number above zero."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to forget as a number below zero")
        if -tokens_to_remove > self.get_seq_length():
            raise ValueError(f"crop({tokens_to_remove}): the cache has {self.get_seq_length()} tokens")
        super().crop(tokens_to_remove)
        self.places.cut(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.places.cut(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in this order."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.places.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.places.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        super().batch_select_indices(indices)
        self.places.select(indices)

    def stored_bytes(self) -> int:
        """Bytes of all that is kept: codes, ranges, outliers, sinks, the window, and where tokens are."""
        return self.places.nbytes + sum(t.nbytes for layer in self.packed for t in layer.tensors())

    def effective_bits(self) -> float:
        """Bits a number of keys and values, of all that is kept."""
        numbers = sum(2 * layer.length_kept * layer.row_numbers for layer in self.packed)
        return 8 * self.stored_bytes() / max(1, numbers)


class PackedLayer(CacheLayerMixin):
    """One layer's keys and values. `keys` and `values` are the recent window, (batch, heads, tokens, channels)."""

    is_croppable = True
    is_compileable = False
    keys: Any
    values: Any

    def __init__(
        self,
        scheme: KvScheme,
        number: int,
        places: Places,
        static: Mapping[str, Static],
        window: int | None,
        *,
        unread: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unread = unread
        self.scheme, self.number, self.places, self.static, self.window = scheme, number, places, static, window
        self.groups: Sequence[HeadGroup] = scheme.layers[number]
        self.unit = tokens_at_once(self.groups)
        self.is_sliding = window is not None
        self._clear()

    def _clear(self) -> None:
        # packed: of each group of heads its keys and its values. begin: slot of the first token still kept.
        self.packed: list[tuple[Stored, Stored]] = []
        self.begin = self.encoded = self.length = 0
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.channels, self.heads = key_states.shape[-1], key_states.shape[1]
        self.static = {name: {n: t.to(self.device) for n, t in own.items()} for name, own in self.static.items()}
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        widths = self.channels, value_states.shape[-1]
        made = turns(self.scheme.rotation, self.static.get("turn.0", {}), widths)
        self.turns = made and (made[0].to(self.device), made[1].to(self.device))
        for group in self.groups:
            group.keys.check(self.channels)
            group.values.check(value_states.shape[-1])
        same = value_states.shape[-1] == self.channels
        self.unread = self.unread and same and supports_layer(self.scheme, self.groups, self.channels)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens (batch, heads, tokens, channels); return all that attention may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self._keep_sinks(key_states, value_states)
        self.length += new
        if self.unread and self.encoded and new <= MOST_QUERIES and not key_states.requires_grad:
            # A copy of this moment: what is encoded or forgotten from here on is put in new tensors.
            history = History(now := copy.copy(self), new, partial(now._seen_by, new))
            tokens = self.length_kept if self.window is None else min(self.length_kept, self.window - 1 + new)
            seen: tuple[Tensor, Tensor] = (
                Unread(history, 0, tokens, key_states),
                Unread(history, 1, tokens, value_states),
            )
        else:
            seen = self._seen_by(new)
        self._settle()
        return seen

    def _seen_by(self, new: int) -> tuple[Tensor, Tensor]:
        """All that the new tokens, so many, may look at."""
        keys, values = self._whole()
        if self.window is None:
            return keys, values
        seen = self.window - 1 + new
        return keys[:, :, -seen:], values[:, :, -seen:]

    @property
    def angles(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of what is encoded, (rows or 1, tokens, half of the channels that turn), float16; None
        where keys have their rotary embedding on."""
        return self.places.angles(self.begin, self.encoded, self.device, self.number) if self.scheme.pre_rope else None

    def first_seen(self, rows: int) -> Tensor | None:
        """(rows,): the first slot that the newest token of each row sees, counted from the first encoded one; None
        where all see all."""
        left = 0 if self.window is None else self.length - self.window
        if self.places.padding is None and left <= self.begin:
            return None
        return (self.places.starts(rows, self.device).clamp(min=left) - self.begin).clamp(min=0)

    def _settle(self) -> None:
        """Encode what has left the window, in whole units; forget what no later token can see."""
        free = self.keys.shape[2] - self.scheme.residual_length
        count = max(0, free) // self.unit * self.unit
        if count:
            keys, values = self._stored_form(self.keys[:, :, :count], self.values[:, :, :count])
            made = [self._encode(g, group, keys, values) for g, group in enumerate(self.groups)]
            self.packed = [_join(*both) for both in zip(self.packed, made, strict=True)] if self.packed else made
            self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
            self.encoded += count
        if self.window is not None:
            # Those before this slot are in no later token's window.
            old = (self.length - self.window + 1 - self.begin) // self.unit * self.unit
            if (gone := min(old, self.encoded)) > 0:
                self.packed = [_cut(pair, self.encoded, gone, self.encoded) for pair in self.packed]
                self.begin += gone
                self.encoded -= gone

    def _encode(self, g: int, group: HeadGroup, keys: Tensor, values: Tensor) -> tuple[Stored, Stored]:
        k, v = (x if group.heads is None else x[:, list(group.heads)] for x in (keys, values))
        static = self.static
        return (
            encode_kv(group.keys, k, static.get(f"keys.{g}"), self.dtype),
            encode_kv(group.values, v, static.get(f"values.{g}"), self.dtype),
        )

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Everything kept, as attention reads it."""
        if not self.encoded:
            return self.keys, self.values
        keys, values = self._decoded()
        if self.sinks is not None:
            self._put_sinks(keys, values)
        return torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """What is encoded, in the model's own form and dtype."""
        made: list[Tensor] = []
        for which, name in enumerate(("keys", "values")):
            parts = []
            for g, (group, packed) in enumerate(zip(self.groups, self.packed, strict=True)):
                fmt = group.values if which else group.keys
                parts.append(
                    (group.heads, decode_kv(fmt, packed[which], self._width(which), self.static.get(f"{name}.{g}")))
                )
            if len(parts) == 1 and parts[0][0] is None:
                made.append(parts[0][1].float())
            else:
                like = parts[0][1]
                whole = like.new_empty((like.shape[0], self.heads, *like.shape[2:]), dtype=torch.float32)
                for heads, part in parts:
                    whole[:, list(heads or range(self.heads))] = part.float()
                made.append(whole)
        return self._model_form(made[0], made[1])

    def _width(self, which: int) -> int:
        window = self.values if which else self.keys
        assert window is not None
        return int(window.shape[-1])

    def _stored_form(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As they are encoded: before the rotary embedding, and rotated, where the scheme says so."""
        start = self.begin + self.encoded
        if self.scheme.pre_rope:
            keys = self.places.unrotate(keys.float(), start, self.number)
        if self.turns:
            keys, values = turned(keys.float(), self.turns[0]), turned(values.float(), self.turns[1])
        return keys, values

    def _model_form(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `_stored_form`, of all that is encoded."""
        if self.turns:
            keys, values = turned(keys, self.turns[0].mT), turned(values, self.turns[1].mT)
        if self.scheme.pre_rope:
            keys = self.places.rotate(keys, self.begin, self.number)
        return keys.to(self.dtype), values.to(self.dtype)

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Remember the first tokens of every row, wherever its padding ends."""
        count = 0 if self.window is not None else self.scheme.sinks
        if not count:
            return
        if self.sinks is None:
            self.sinks = tuple(x.new_zeros(*x.shape[:2], count, x.shape[-1]) for x in (keys, values))  # type: ignore[assignment]
        slots = self.places.starts(keys.shape[0], keys.device)[:, None] + torch.arange(count, device=keys.device)
        rows, which = ((slots >= self.length) & (slots < self.length + keys.shape[2])).nonzero(as_tuple=True)
        assert self.sinks is not None
        for kept, x in zip(self.sinks, (keys, values), strict=True):
            kept[rows, :, which] = x[rows, :, slots[rows, which] - self.length]

    def _put_sinks(self, keys: Tensor, values: Tensor) -> None:
        assert self.sinks is not None
        count = self.sinks[0].shape[2]
        slots = self.places.starts(keys.shape[0], keys.device)[:, None] + torch.arange(count, device=keys.device)
        rows, which = (slots < self.encoded).nonzero(as_tuple=True)
        for kept, x in zip(self.sinks, (keys, values), strict=True):
            x[rows, :, slots[rows, which]] = kept[rows, :, which]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what attention is given."""
        if self.window is None:
            return self.length + query_length, 0
        return min(self.length, self.window - 1) + query_length, max(self.length - self.window + 1, 0)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no limit but a sliding window's."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number, as transformers counts)."""
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        if self.window is not None and self.length - count - self.window + 1 < self.begin and self.begin:
            raise RuntimeError(f"cannot crop {count} tokens: what a sliding window saw before them is forgotten")
        self.length -= count
        inside = self.keys.shape[2]
        if count <= inside:
            self.keys, self.values = self.keys[:, :, : inside - count], self.values[:, :, : inside - count]
            return
        left = self.encoded - (count - inside)
        whole = left // self.unit * self.unit
        keys, values = self._decoded()
        self.keys, self.values = keys[:, :, whole:left].clone(), values[:, :, whole:left].clone()
        self.packed = [_cut(pair, self.encoded, 0, whole) for pair in self.packed] if whole else []
        self.encoded = whole

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in this order."""
        if self.is_initialized:
            self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        if self.is_initialized:
            self._map(lambda t: t[indices.to(t.device), ...])

    def offload(self) -> None:
        """Move everything to the CPU."""
        if self.is_initialized:
            self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        if self.is_initialized and self.keys.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, change: Any) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.packed = [
            ({n: change(t) for n, t in k.items()}, {n: change(t) for n, t in v.items()}) for k, v in self.packed
        ]
        if self.sinks is not None:
            self.sinks = (change(self.sinks[0]), change(self.sinks[1]))

    def tensors(self) -> list[Tensor]:
        """All that this layer keeps."""
        kept = [t for pair in self.packed for stored in pair for t in stored.values()]
        kept += [*(self.sinks or ()), *([] if self.keys is None else [self.keys, self.values])]
        return kept

    @property
    def length_kept(self) -> int:
        """Tokens kept."""
        return self.length - self.begin

    @property
    def rows(self) -> int | None:
        """Texts of the batch; None while there are no tokens."""
        return None if self.keys is None else int(self.keys.shape[0])

    @property
    def row_numbers(self) -> int:
        """Numbers of the keys of one token, over the batch."""
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[1] * self.keys.shape[3]


def _cut(pair: tuple[Stored, Stored], tokens: int, start: int, stop: int) -> tuple[Stored, Stored]:
    """The tokens [start, stop) of keys and values that are stored for this many tokens."""

    def cut(t: Tensor) -> Tensor:
        per = tokens // t.shape[2]
        return t[:, :, start // per : stop // per].clone()

    first, second = ({n: cut(t) for n, t in stored.items()} for stored in pair)
    return first, second


def _join(old: tuple[Stored, Stored], new: tuple[Stored, Stored]) -> tuple[Stored, Stored]:
    first, second = ({n: torch.cat([a[n], b[n]], 2) for n in a} for a, b in zip(old, new, strict=True))
    return first, second
