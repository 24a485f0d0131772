"""Positions of the tokens in a cache, and the padding before the tokens of each row.

A cache gets keys with their rotary embedding applied, and no positions. A hook on the model (`kv.attach`) calls
`TokenPositions.begin_pass` at the beginning of each forward pass.

Axes: B rows of the batch, H key-value heads, T tokens, C channels. A *column* is a place along T, padding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laconic.kv.rotary import RotaryEmbedding, apply_rotary, remove_rotary

RotaryAngles = tuple[Tensor, Tensor]
"""Cosines and sines by which packed keys are rotated, the first half of the channels against the second: (B or 1, T,
C / 2), float16."""


class TokenPositions:
    """Positions of all tokens of a cache.

    Attributes:
        rotary: Rotary embedding of the model; None where keys are stored with it.
        positions: Positions of the tokens, (B or 1, T) int32; None before the first pass, or without `rotary`.
        padding: Number of padding columns before the first token of each row, (B,); None where no row has any.
        only_padding: Whether the mask of the current pass hides padding and nothing else.
    """

    def __init__(self, rotary: RotaryEmbedding | None = None) -> None:
        self.rotary = rotary
        self.positions: Tensor | None = None
        self.padding: Tensor | None = None
        self.only_padding = False
        # Layers of one type ask for the same angles in one pass.
        self._angles: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for t in (self.positions, self.padding) if t is not None)

    def begin_pass(self, cached: int, new: int, positions: Tensor | None, mask: Tensor | None) -> None:
        """Store the positions and the padding of a forward pass that begins.

        Args:
            cached: Tokens in the cache so far.
            new: New tokens of the pass.
            positions: Positions of the new tokens, (B or 1, new); counted on from `cached` if None.
            mask: Attention mask, zero for padding: (B, cached + new); of four dimensions where a model makes its own.
        """
        # The padding of an earlier text must not remain; that of a new one is read from the mask below.
        self.crop(cached)
        self._angles.clear()
        # While all tokens so far are padding, more padding may follow.
        two_dimensional = mask is None or mask.dim() == 2
        if mask is not None and two_dimensional and not mask.all():
            hidden_BT = (mask == 0).long()
            self.padding = hidden_BT.cumprod(-1).sum(-1)
            self.only_padding = bool((hidden_BT.sum(-1) == self.padding).all())
        else:
            self.only_padding = two_dimensional and self.padding is None
        if self.rotary is None:
            return
        if positions is None:
            positions = torch.arange(cached, cached + new)[None]
        new_BT = positions.to(torch.int32)
        if self.positions is None:
            self.positions = new_BT
        else:
            rows = max(len(self.positions), len(new_BT))
            self.positions = torch.cat([p.to(new_BT.device).expand(rows, -1) for p in (self.positions, new_BT)], 1)

    def crop(self, tokens: int) -> None:
        """Remove all but the first tokens.

        Args:
            tokens: Number of tokens that stay.
        """
        if tokens == 0:
            self.positions = self.padding = None
        elif self.positions is not None:
            self.positions = self.positions[:, :tokens]

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch, in a new order.

        Args:
            rows: (n,) int64, the rows.
        """
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows.to(self.positions.device)]
        if self.padding is not None:
            self.padding = self.padding[rows.to(self.padding.device)]
        self._angles.clear()

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch.

        Args:
            times: Number of copies of a row, side by side.
        """
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.repeat_interleave(times, 0)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(times, 0)
        self._angles.clear()

    def first_columns(self, rows: int, device: torch.device) -> Tensor:
        """Return the column of every row's first token, (B,) int64.

        Args:
            rows: Number of rows B.
            device: Device of the result.
        """
        return torch.zeros(rows, dtype=torch.long, device=device) if self.padding is None else self.padding.to(device)

    def apply_rotary(self, keys_BHTC: Tensor, start: int, layer: int) -> Tensor:
        """Apply the rotary embedding to keys.

        Args:
            keys_BHTC: Keys without it, of neighbouring columns.
            start: Column of the first of them.
            layer: Number of the layer.

        Returns:
            (B, H, T, C).

        Raises:
            ValueError: The model gives this cache no positions.
        """
        return apply_rotary(keys_BHTC, *self._cos_sin(start, keys_BHTC.shape[2], keys_BHTC.device, layer))

    def remove_rotary(self, keys_BHTC: Tensor, start: int, layer: int) -> Tensor:
        """Invert `apply_rotary`, also where the embedding scales by a factor.

        Args:
            keys_BHTC: Keys of neighbouring columns.
            start: Column of the first of them.
            layer: Number of the layer.

        Returns:
            (B, H, T, C).

        Raises:
            ValueError: The model gives this cache no positions.
        """
        return remove_rotary(keys_BHTC, *self._cos_sin(start, keys_BHTC.shape[2], keys_BHTC.device, layer))

    def angles(self, start: int, tokens: int, device: torch.device, layer: int) -> RotaryAngles:
        """Return cosines and sines for the first half of the channels that rotate; the second half has the same.

        Args:
            start: First column.
            tokens: Number of columns T.
            device: Device of the result.
            layer: Number of the layer.

        Raises:
            ValueError: The model gives this cache no positions.
        """
        key = ("half", self._layer_type(layer), start, tokens)
        if key not in self._angles:
            cos, sin = self._cos_sin(start, tokens, device, layer)
            n = cos.shape[-1] // 2
            self._angles[key] = (cos[:, 0, :, :n].half().contiguous(), sin[:, 0, :, :n].half().contiguous())
        return self._angles[key]

    def _layer_type(self, layer: int) -> str | None:
        assert self.rotary is not None
        return self.rotary.layer_types[layer] if self.rotary.layer_types else None

    def _cos_sin(self, start: int, tokens: int, device: torch.device, layer: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (B or 1, 1, tokens, channels that rotate), float32."""
        assert self.rotary is not None
        if self.positions is None:
            raise ValueError(
                "the model does not give this cache the positions of its tokens, so it was made for another model; "
                "make one for each, by laconic.kv_cache"
            )
        stop = start + tokens
        layer_type = self._layer_type(layer)
        if (layer_type, start, stop) not in self._angles:
            positions = self.positions[:, start:stop].long().to(device)
            options = {} if layer_type is None else {"layer_type": layer_type}
            cos, sin = self.rotary.module(torch.empty(0, dtype=torch.float32, device=device), positions, **options)
            self._angles[layer_type, start, stop] = (cos.float()[:, None], sin.float()[:, None])
        return self._angles[layer_type, start, stop]
