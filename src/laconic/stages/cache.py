"""A stage that says how the key-value cache is stored: it changes no weight, and may want to look into attention.

`scheme` alone tells what a tuning-free method needs. What calibration fixes, and how bits are shared out, is the same
for all methods: this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.calibrate.attention import Seen, attention_error, key_weight, value_weight
from laconic.calibrate.rotation import find_turn
from laconic.config import Config
from laconic.kv.fit import Correction, fit_static
from laconic.kv.format import KvFormat
from laconic.kv.open import KvShape
from laconic.kv.scheme import HeadGroup, KvScheme, Layer
from laconic.solvers.allocate import allocate
from laconic.solvers.rotate import turned, turns

# What may be chosen from where bits are shared out.
_CHOICES = (2, 3, 4, 8)
_PLAIN = KvFormat(16)

Static = dict[str, Tensor]


class CacheStage(Config):
    """residual_length: at least so many of the most recent tokens stay in 16 bit. sinks: so many first tokens do.
    rotation: turns the channels of keys and values before they are rounded: `hadamard`; `attention`, of each head the
    one that costs attention least on the calibration set. budget_bits: share out so many
    bits a number, on the average of keys and values, by the error that they cause in attention, among 2, 3, 4 and 8;
    per_head: among heads rather than layers. max_error: keep a layer in 16 bit whose attention's relative squared error
    is above this."""

    scope: ClassVar[Literal["cache"]] = "cache"
    method: str
    residual_length: int = Field(0, ge=0)
    sinks: int = Field(0, ge=0)
    rotation: Literal["hadamard", "attention"] | None = None
    budget_bits: float | None = Field(None, ge=2, le=8)
    per_head: bool = False
    max_error: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _per_head_of_a_budget(self) -> CacheStage:
        if self.per_head and self.budget_bits is None:
            raise ValueError("per_head shares out a budget; give budget_bits too")
        return self

    @property
    def pre_rope(self) -> bool:
        """Whether keys are stored as they were before their rotary embedding."""
        return False

    @property
    def level_correction(self) -> Correction:
        """What levels are given back of what rounding to means takes."""
        return "none"

    @property
    def observes(self) -> bool:
        """Whether the stage needs calibration text."""
        keys, values = self.formats(KvShape(1, 1, 64, (None,)))
        chosen = self.budget_bits is not None or self.max_error is not None or self.rotation == "attention"
        return chosen or keys.calibrated or values.calibrated

    @property
    def engine_scheme(self) -> dict[str, Any] | None:
        """What compressed-tensors calls `kv_cache_scheme`, where engines have such a cache of their own."""
        return None

    def engine_scales(self, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scales of one layer that go with `engine_scheme`, `k_scale` and `v_scale`."""
        return {}

    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        """How keys and values are stored where nothing is shared out."""
        raise NotImplementedError

    def check_length(self, shape: KvShape, tokens: int) -> None:
        """Raises: ValueError when calibration samples of so many tokens are too short to be stored."""
        need = max(fmt.tokens_at_once for fmt in self.formats(shape))
        if tokens < need:
            raise ValueError(
                f"{self.method} stores {need} tokens together, more than the {tokens} of a calibration sample; raise "
                "calibration.max_seq_length, or lower group_size"
            )

    def scheme(self, shape: KvShape, layers: Sequence[Layer] | None = None) -> KvScheme:
        """The cache's scheme, with these layers where calibration chose them.

        Raises: ValueError when the model's heads cannot be stored so, or its context is too short for it.
        """
        keys, values = self.formats(shape)
        unit = max(keys.tokens_at_once, values.tokens_at_once)
        if shape.context is not None and self.sinks + self.residual_length + unit > shape.context:
            raise ValueError(
                f"{self.method} would store nothing in the model's context of {shape.context} tokens: {unit} are stored"
                f" together, and {self.residual_length} recent ones and {self.sinks} first ones stay in 16 bit; lower "
                "group_size, residual_length or sinks"
            )
        chosen = tuple(layers) if layers else ((HeadGroup(keys, values),),) * shape.layers
        scheme = KvScheme(self.method, chosen, self.residual_length, self.sinks, self.rotation, pre_rope=self.pre_rope)
        scheme.check(shape.layers, shape.heads, shape.channels)
        return scheme

    def calibrate(self, seen: Seen, shape: KvShape) -> dict[str, Tensor]:
        """All that one layer's calibration tells: `keys.B.scale` and so on for each number of bits B that may be
        chosen, and what storing them so does to attention's output, as a share of its square: `error.keys` and
        `error.values` (heads, choices) where a budget is shared out, else `error` (heads,) where that is asked for; and
        `turn.keys`, `turn.values` (heads, channels, channels) where rotations are found by calibration."""
        told: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        for which, plain in zip(("keys", "values"), self.formats(shape), strict=True):
            turn = self._turn(seen, which, plain)
            if self.rotation == "attention" and turn is not None:
                told[f"turn.{which}"] = turn
            formats = [replace(plain, num_bits=bits) for bits in self._choices(plain)]
            fixed = self._fixed(seen, which, formats, turn)
            told |= {
                f"{which}.{fmt.num_bits}.{name}": t
                for fmt, static in zip(formats, fixed, strict=True)
                for name, t in static.items()
            }
            if self.budget_bits is not None or self.max_error is not None:
                lost = [attention_error(seen, which, f, s, turn) for f, s in zip(formats, fixed, strict=True)]
                errors[which] = torch.stack(lost, -1)
        if self.budget_bits is not None:
            told |= {f"error.{which}": error for which, error in errors.items()}
        elif self.max_error is not None:
            told["error"] = (errors["keys"] + errors["values"])[:, 0]
        return told

    def _turn(self, seen: Seen, which: str, fmt: KvFormat) -> Tensor | None:
        """The rotation of a layer's keys, or values, (heads or 1, channels, channels)."""
        if self.rotation == "attention":

            def error(turn: Tensor) -> Tensor:
                return attention_error(seen, which, fmt, self._fixed(seen, which, [fmt], turn)[0], turn)

            return find_turn(seen, which, fmt, error)
        made = turns(self.rotation, {}, (seen.keys.shape[-1], seen.values.shape[-1]))
        return made and made[which == "values"].to(seen.keys.device)

    def _fixed(self, seen: Seen, which: str, formats: Sequence[KvFormat], turn: Tensor | None) -> list[Static]:
        """What calibration fixes of keys, or values, stored in each of these formats."""
        if not any(fmt.calibrated for fmt in formats):
            return [{} for _ in formats]
        x = seen.stored_keys if which == "keys" else seen.values
        x = x if turn is None else turned(x, turn)
        weight = key_weight(seen, turn) if which == "keys" else value_weight(seen)
        whole = x.shape[2] // formats[0].tokens_at_once * formats[0].tokens_at_once
        x, weight = x[:, :, :whole], weight[:, :, :whole]
        return [fit_static(fmt, x, weight, correction=self.level_correction) for fmt in formats]

    def settle(self, shape: KvShape, told: Sequence[Mapping[str, Tensor]]) -> tuple[KvScheme, dict[str, Tensor]]:
        """The scheme, and what is fixed of it, once all layers are calibrated.

        Returns: tensors by `LAYER.keys.GROUP.scale` and so on.
        """
        layers = (
            self._shared_out(shape, told) if self.budget_bits is not None else [self._whole(shape, t) for t in told]
        )
        fixed = {
            f"{i}.turn.0.{which}": own[f"turn.{which}"].clone()
            for i, own in enumerate(told)
            for which in ("keys", "values")
            if self.rotation == "attention"
        }
        for i, layer in enumerate(layers):
            for g, group in enumerate(layer):
                for which, fmt in (("keys", group.keys), ("values", group.values)):
                    prefix = f"{which}.{fmt.num_bits}."
                    for name, tensor in told[i].items():
                        if fmt.calibrated and name.startswith(prefix):
                            own = (
                                tensor
                                if group.heads is None or len(tensor) == 1 or "levels" in name
                                else tensor[list(group.heads)]
                            )
                            fixed[f"{i}.{which}.{g}.{name.removeprefix(prefix)}"] = own.clone()
        return self.scheme(shape, layers), fixed

    def _choices(self, fmt: KvFormat) -> Sequence[int]:
        return _CHOICES if self.budget_bits is not None else (fmt.num_bits,)

    def _whole(self, shape: KvShape, told: Mapping[str, Tensor]) -> Layer:
        keys, values = self.formats(shape)
        lost = self.max_error is not None and float(told["error"].mean()) > self.max_error
        return (HeadGroup(_PLAIN, _PLAIN),) if lost else (HeadGroup(keys, values),)

    def _shared_out(self, shape: KvShape, told: Sequence[Mapping[str, Tensor]]) -> list[Layer]:
        """Layers, or heads, with as many bits as they are worth."""
        assert self.budget_bits is not None
        keys, values = self.formats(shape)
        tables: list[list[float]] = []
        for layer in told:
            for which in ("keys", "values"):
                errors = layer[f"error.{which}"]
                tables += (errors if self.per_head else errors.mean(0, keepdim=True)).tolist()
        chosen = [_CHOICES[c] for c in allocate(tables, _CHOICES, self.budget_bits * len(tables))]
        heads = shape.heads if self.per_head else 1
        layers: list[Layer] = []
        for i, layer in enumerate(told):
            own = chosen[2 * heads * i : 2 * heads * (i + 1)]
            pairs = list(zip(own[:heads], own[heads:], strict=True))
            error = sum(
                float(layer[f"error.{w}"][h if self.per_head else slice(None), _CHOICES.index(p[side])].mean()) / heads
                for h, p in enumerate(pairs)
                for side, w in enumerate(("keys", "values"))
            )
            if self.max_error is not None and error > self.max_error:
                layers.append((HeadGroup(_PLAIN, _PLAIN),))
                continue
            groups = {pair: [h for h, p in enumerate(pairs) if p == pair] for pair in sorted(set(pairs))}
            layers.append(
                tuple(
                    HeadGroup(
                        replace(keys, num_bits=k),
                        replace(values, num_bits=v),
                        tuple(which) if len(groups) > 1 else None,
                    )
                    for (k, v), which in groups.items()
                )
            )
        return layers
