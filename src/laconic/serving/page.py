"""Pages of packed keys and values: how the tokens of one layer become bytes, and where these lie in a page.

A cache is pages, (H, tokens of a page, X) each, and a sequence is a row of page numbers. The bytes of a head of a page
lie one after another, whatever X is: first the slots of its tokens, each field of a slot as an array over all tokens,
so that a kernel reads codes in wide words; then the exact first tokens of a text (in its first page), the ranges that
units of tokens share, and the exact newest tokens of the page (`serving.page_write`).

Axes: B sequences, H key-value heads, N new tokens, T tokens, U units of tokens, P pages, C channels, X bytes of a slot
or of a token, F bytes of a head of a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from laconic.kv.format import StaticParams, decode_kv, encode_kv
from laconic.kv.rotary import apply_rotary, remove_rotary
from laconic.kv.scheme import HeadGroup, tokens_at_once
from laconic.serving.slot import SlotLayout, array_bytes, from_arrays, slot_layout
from laconic.solvers.rotate import Rotations, rotate

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines of every position, (positions, channels that rotate), float32."""


@dataclass(frozen=True)
class PagedLayer:
    """Storage of one layer's keys and values in pages: encoding, decoding, and the layout of a page.

    Attributes:
        groups: Formats of its groups of heads.
        static: Static parameters of `keys.G` and `values.G`, G the number of the group of heads.
        heads: Key-value heads.
        channels: Channels of a head.
        dtype: Dtype of what is stored in 16 bit.
        rotations: Rotations of keys and values before they are rounded.
        rotary: Rotary embedding of every position, where keys are stored before it.
        sinks: Number of first tokens of a text that are stored exactly.
        residual_length: Smallest number of tokens before a new one that it attends to exactly.
        page_tokens: Tokens of a page, where it has more than slots.
    """

    groups: Sequence[HeadGroup]
    static: Mapping[str, StaticParams]
    heads: int
    channels: int
    dtype: torch.dtype
    rotations: Rotations | None = None
    rotary: RotaryTable | None = None
    sinks: int = 0
    residual_length: int = 0
    page_tokens: int | None = None

    def to(self, device: torch.device) -> PagedLayer:
        """Return the layer with its tensors on a device.

        Args:
            device: The device.
        """
        static = {name: {n: t.to(device) for n, t in params.items()} for name, params in self.static.items()}
        rotary = None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device))
        rotations = None if self.rotations is None else (self.rotations[0].to(device), self.rotations[1].to(device))
        return replace(self, static=static, rotary=rotary, rotations=rotations)

    @cached_property
    def unit(self) -> int:
        """Tokens of a unit: they are encoded together."""
        return tokens_at_once(self.groups)

    @cached_property
    def layouts(self) -> list[SlotLayout]:
        """Layout of the slots of each group of heads."""
        return [slot_layout(g, self.channels, self.dtype, self.unit) for g in self.groups]

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return max(layout.nbytes for layout in self.layouts)

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes that the tokens of a unit share."""
        return max(layout.shared_nbytes for layout in self.layouts)

    @cached_property
    def exact_bytes(self) -> int:
        """Bytes of a token that is kept exact."""
        return 2 * self.channels * torch.empty(0, dtype=self.dtype).element_size()

    @property
    def lookback(self) -> int:
        """Largest number of tokens before a new one that it attends to exactly, sinks apart."""
        return self.residual_length + self.unit - 1

    @cached_property
    def recent(self) -> int:
        """Number of newest tokens that each page keeps exact."""
        if not self.lookback:
            return 0
        # A token overwrites one that no later token attends to exactly.
        assert self.page_tokens is not None
        return min(self.residual_length + self.unit, self.page_tokens)

    def exact_from(self, positions: Tensor) -> Tensor:
        """Return the first token that tokens at these positions attend to exactly, sinks apart; of a whole unit.

        Args:
            positions: Positions of any shape.
        """
        return (positions - self.residual_length).clamp(min=0) // self.unit * self.unit

    def shared_at(self, page_tokens: int) -> int:
        """Return the first byte, in a head of a page, of the ranges that units share.

        Args:
            page_tokens: Tokens of a page.
        """
        return page_tokens * self.slot_bytes + self.sinks * self.exact_bytes

    def recent_at(self, page_tokens: int) -> int:
        """Return the first byte, in a head of a page, of the exact newest tokens.

        Args:
            page_tokens: Tokens of a page.
        """
        return self.shared_at(page_tokens) + page_tokens // self.unit * self.shared_bytes

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a head of a page, divided by the tokens of a page; even, so that float16 numbers are aligned.

        Raises:
            ValueError: Pages are too small, or do not hold whole units.
        """
        if self.page_tokens is None:
            assert not self.lookback
            assert not self.sinks
            return self.slot_bytes
        if self.page_tokens % self.unit or self.sinks > self.page_tokens:
            raise ValueError(
                f"pages of {self.page_tokens} tokens hold no whole units of {self.unit}, or not {self.sinks} exact "
                "first tokens; serve with "
                f"--block-size {-(-max(self.page_tokens, self.sinks) // self.unit) * self.unit}"
            )
        nbytes = self.recent_at(self.page_tokens) + self.recent * self.exact_bytes
        return (-(-nbytes // self.page_tokens) + 1) // 2 * 2

    @property
    def rotates_queries(self) -> bool:
        """Whether queries are rotated instead of decoded keys, which leaves their products unchanged.

        This is not possible where the rotary embedding comes between: keys that are stored before it.
        """
        return self.rotations is not None and self.rotary is None

    def encode(self, keys_BHTC: Tensor, values_BHTC: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the tokens of whole units.

        Args:
            keys_BHTC: (B, H, T, C) keys, T a multiple of `unit`.
            values_BHTC: (B, H, T, C) values.
            positions_BT: (B, T) positions; read only where keys are stored before their rotary embedding.

        Returns:
            Slots (B, H, T, `slot_bytes`) and bytes that units share (B, H, U, `shared_bytes`), uint8.
        """
        keys, values = keys_BHTC, values_BHTC
        if self.rotary is not None:
            keys = remove_rotary(keys.float(), *self._cos_sin(positions_BT))
        if self.rotations:
            keys, values = rotate(keys.float(), self.rotations[0]), rotate(values.float(), self.rotations[1])
        lead, tokens = keys.shape[:2], keys.shape[2]
        slots = torch.zeros(*lead, tokens, self.slot_bytes, dtype=torch.uint8, device=keys.device)
        shared = torch.zeros(*lead, tokens // self.unit, self.shared_bytes, dtype=torch.uint8, device=keys.device)
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            heads = slice(None) if group.heads is None else list(group.heads)
            slots[:, heads, :, : layout.nbytes], shared[:, heads, :, : layout.shared_nbytes] = layout.pack(
                encode_kv(group.keys, keys[:, heads], self.static.get(f"keys.{g}"), self.dtype),
                encode_kv(group.values, values[:, heads], self.static.get(f"values.{g}"), self.dtype),
            )
        return slots, shared

    def decode(self, slots_BHTX: Tensor, shared_BHUX: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Invert `encode`, but for rotations.

        Args:
            slots_BHTX: (B, H, T, `slot_bytes`) uint8 slots.
            shared_BHUX: (B, H, U, `shared_bytes`) uint8 bytes that units share.
            positions: (B or 1, T) positions.

        Returns:
            Keys and values, (B, H, T, C) float32; keys are still rotated if `rotates_queries`, and values if there are
            `rotations`.
        """
        decoded = []
        for g, (group, layout) in enumerate(zip(self.groups, self.layouts, strict=True)):
            heads = slice(None) if group.heads is None else list(group.heads)
            keys, values = layout.unpack(slots_BHTX[:, heads], shared_BHUX[:, heads])
            k = decode_kv(group.keys, keys, self.channels, self.static.get(f"keys.{g}"))
            v = decode_kv(group.values, values, self.channels, self.static.get(f"values.{g}"))
            decoded.append((k.float(), v.float()))
        k_BHTC, v_BHTC = decoded[0]
        if self.groups[0].heads is not None:
            k_BHTC, v_BHTC = (k_BHTC.new_empty(*slots_BHTX.shape[:3], self.channels) for _ in range(2))
            for group, (k, v) in zip(self.groups, decoded, strict=True):
                k_BHTC[:, list(group.heads or ())], v_BHTC[:, list(group.heads or ())] = k, v
        if self.rotary is not None:
            k_BHTC = rotate(k_BHTC, self.rotations[0].mT) if self.rotations else k_BHTC
            k_BHTC = apply_rotary(k_BHTC, *self._cos_sin(positions))
        return k_BHTC, v_BHTC

    def rotate_exact(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate exact keys and values as `decode` leaves the encoded ones.

        Args:
            keys_BHTC: (B, H, T, C) keys.
            values_BHTC: (B, H, T, C) values.

        Returns:
            Keys and values of the same shapes: rotated where `decode` leaves them rotated, else unchanged.
        """
        if self.rotations is None:
            return keys_BHTC, values_BHTC
        keys = rotate(keys_BHTC, self.rotations[0]) if self.rotates_queries else keys_BHTC
        return keys, rotate(values_BHTC, self.rotations[1])

    def heads_of_pages(self, cache: Tensor) -> Tensor:
        """View a cache as the bytes of each head of each page.

        Args:
            cache: Pages, (pages, H, tokens of a page, `row_bytes`) uint8; the rows of a head lie one after another.

        Returns:
            (pages, H, F) uint8, of the same storage.
        """
        assert cache.shape[3] == self.row_bytes == cache.stride(2)
        return cache.flatten(2)

    def read_slots(self, pages: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the slots in heads of pages, and the bytes that units share.

        Args:
            pages: (..., H, F) bytes.
            page_tokens: Tokens of a page.

        Returns:
            Slots (..., H, tokens of a page, `slot_bytes`) and shared bytes (..., H, units of a page, `shared_bytes`).
        """
        units = page_tokens // self.unit
        slots = pages.new_zeros(*pages.shape[:-1], page_tokens, self.slot_bytes)
        shared = pages.new_zeros(*pages.shape[:-1], units, self.shared_bytes)
        shared_pages = pages[..., self.shared_at(page_tokens) :]
        for group, layout in zip(self.groups, self.layouts, strict=True):
            heads = slice(None) if group.heads is None else list(group.heads)
            of_slots = from_arrays(layout.fields, pages[..., heads, :], page_tokens)
            slots[..., heads, :, : of_slots.shape[-1]] = of_slots
            of_units = from_arrays(layout.shared, shared_pages[..., heads, :], units)
            shared[..., heads, :, : of_units.shape[-1]] = of_units
        return slots, shared

    def slot_addresses(self, slots: Tensor, page_tokens: int) -> Tensor:
        """Return the address of every byte of slots in a head of a page.

        Args:
            slots: (n,) numbers of the slots in their pages.
            page_tokens: Tokens of a page.

        Returns:
            (n, H or 1, `slot_bytes`) int64.
        """
        addresses = [array_bytes(layout.fields, self.slot_bytes, slots, page_tokens) for layout in self.layouts]
        return self._of_heads(addresses)

    def shared_addresses(self, units: Tensor, page_tokens: int) -> Tensor:
        """Return the address, in a head of a page, of every byte that units share.

        Args:
            units: (n,) numbers of the units in their pages.
            page_tokens: Tokens of a page.

        Returns:
            (n, H or 1, `shared_bytes`) int64.
        """
        count = page_tokens // self.unit
        addresses = [array_bytes(layout.shared, self.shared_bytes, units, count) for layout in self.layouts]
        return self.shared_at(page_tokens) + self._of_heads(addresses)

    def _of_heads(self, addresses: list[Tensor]) -> Tensor:
        """Join the addresses (n, X) of each group of heads."""
        if self.groups[0].heads is None:
            return addresses[0][:, None]
        joined = addresses[0].new_empty(len(addresses[0]), self.heads, addresses[0].shape[1])
        for group, of_group in zip(self.groups, addresses, strict=True):
            joined[:, list(group.heads or ())] = of_group[:, None]
        return joined

    def to_exact(self, keys: Tensor, values: Tensor) -> Tensor:
        """Store keys and values exactly, as the bytes of `dtype`.

        Args:
            keys: (..., C) keys.
            values: (..., C) values.

        Returns:
            (..., `exact_bytes`) uint8.
        """
        return torch.cat([keys, values], -1).to(self.dtype).contiguous().view(torch.uint8)

    def from_exact(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Invert `to_exact`.

        Args:
            exact: (..., `exact_bytes`) uint8.

        Returns:
            Keys and values, (..., C) float32.
        """
        keys, values = exact.contiguous().view(self.dtype).float().chunk(2, -1)
        return keys, values

    def _cos_sin(self, positions: Tensor) -> RotaryTable:
        assert self.rotary is not None
        cos, sin = self.rotary
        positions = positions.clamp(max=len(cos) - 1)  # a page may extend beyond the longest text
        return cos[positions][:, None], sin[positions][:, None]


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences of one step that have the same number of new tokens.

    Attributes:
        table_BP: (B, P) numbers of the pages of each sequence.
        lengths_B: (B,) tokens of each sequence, new ones included.
        longest: Largest length, or an upper bound of it.
        tokens_BN: (B, N) indices of the new tokens among all tokens of the step.
        first_tokens: Whether these are 0 to B - 1, one of each sequence; sequences of no tokens are padding.
        known_lengths: Lengths on the host; None where they are not known exactly.
    """

    table_BP: Tensor
    lengths_B: Tensor
    longest: int
    tokens_BN: Tensor
    first_tokens: bool = False
    known_lengths: Sequence[int] | None = None

    @property
    def positions_BN(self) -> Tensor:
        """Positions of the new tokens."""
        n = self.tokens_BN.shape[1]
        return self.lengths_B.long()[:, None] - n + torch.arange(n, device=self.lengths_B.device)


@dataclass(frozen=True)
class Scoring:
    """Settings of attention scores.

    Attributes:
        scale: Factor of the products of queries and keys.
        window: Number of tokens that a token attends to, itself included. None: all.
        softcap: Bound of the scores, by tanh; 0 for none.
        slopes: ALiBi's slope of each query head.
    """

    scale: float
    window: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None
