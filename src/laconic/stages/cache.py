"""A stage that chooses how the key-value cache is stored: it changes no weight, and may calibrate on attention.

A method without calibration only implements `formats`. Static parameters, rotations and the allocation of bits are the
same for all methods and are here.

Axes: H key-value heads, C channels of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from laconic.calibrate.attention import AttentionCapture, attention_error, key_weight, value_weight
from laconic.kv.fit import Correction, fit_static
from laconic.kv.format import KvFormat, StaticParams
from laconic.kv.scheme import ROTATIONS, HeadGroup, KvScheme, LayerScheme
from laconic.kv.shape import KvShape
from laconic.solvers.allocate import allocate
from laconic.solvers.rotate import layer_rotations, rotate
from laconic.stages.linear import WeightStage
from laconic.stages.rotation import find_rotation
from laconic.stages.stage import Needs, Scope, Stage

# Bits among which a budget is allocated.
_CHOICES = (2, 3, 4, 8)
_PLAIN = KvFormat(16)
_SIDES = ("keys", "values")
# Prefix of a rotation's key, on disk: an older name of rotations, so that interrupted runs can be resumed.
_ROTATION = "turn"

Calibration = Mapping[str, Tensor]
"""Result of `CacheStage.calibrate` for one layer."""


class CacheStage(Stage):
    """Options of every cache method.

    Attributes:
        residual_length: At least so many of the most recent tokens stay in 16 bit.
        sinks: So many of a sequence's first tokens stay in 16 bit.
        rotation: Rotation of the channels of keys and values before they are rounded: `hadamard`; or `attention`, for
            each head the one with the least error of attention on the calibration set.
        budget_bits: Average bits per number, allocated among 2, 3, 4 and 8 bits by the error that they cause in
            attention: to the keys and to the values of each layer.
        per_head: Whether the budget is allocated to each head rather than to each layer.
        max_error: Keep a layer in 16 bit where the relative squared error of attention is above this.
    """

    scope: ClassVar[Scope] = "cache"

    residual_length: int = Field(0, ge=0)
    sinks: int = Field(0, ge=0)
    rotation: Literal["hadamard", "attention"] | None = None
    budget_bits: float | None = Field(None, ge=2, le=8)
    per_head: bool = False
    max_error: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _per_head_needs_budget(self) -> CacheStage:
        if self.per_head and self.budget_bits is None:
            raise ValueError("per_head allocates a budget to heads; give budget_bits too")
        return self

    @property
    def pre_rope(self) -> bool:
        """Whether keys are stored as they were before their rotary embedding."""
        return False

    @property
    def level_correction(self) -> Correction:
        """Correction of levels from k-means (`kv.fit`)."""
        return "none"

    @property
    def needs(self) -> Needs:
        keys, values = self._formats(KvShape(1, 1, 64, (None,)))
        chooses = self.budget_bits is not None or self.max_error is not None or self.rotation == "attention"
        return Needs(activations=chooses or keys.calibrated or values.calibrated)

    @property
    def engine_scheme(self) -> dict[str, Any] | None:
        """`kv_cache_scheme` of compressed-tensors, where engines have such a cache of their own."""
        return None

    def engine_scales(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return `k_scale` and `v_scale` (1,) of one layer, which go with `engine_scheme`; nothing without one.

        Args:
            calibration: Result of `calibrate` for the layer.
        """
        return {}

    @abstractmethod
    def formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        """Return the formats of keys and of values, before bits are allocated.

        Args:
            shape: Shape of the model's cache.
        """

    def _formats(self, shape: KvShape) -> tuple[KvFormat, KvFormat]:
        """Return what `formats` returned, once it is checked."""
        formats: Any = self.formats(shape)
        if not isinstance(formats, tuple | list) or [isinstance(f, KvFormat) for f in formats] != [True, True]:
            raise TypeError(
                f"{type(self).__name__}.formats() of the method '{self.method}' returned {str(formats)[:60]}; return "
                "two laconic.kv.format.KvFormat, of keys and of values"
            )
        keys, values = formats
        return keys, values

    def check_length(self, shape: KvShape, tokens: int) -> None:
        """Check that calibration samples are long enough to be encoded.

        Args:
            shape: Shape of the model's cache.
            tokens: Tokens of a sample.

        Raises:
            ValueError: They are too short.
        """
        at_once = max(fmt.tokens_at_once for fmt in self._formats(shape))
        if tokens < at_once:
            raise ValueError(
                f"{self.method} stores {at_once} tokens together, more than the {tokens} of a calibration sample; "
                "raise calibration.max_seq_length, or lower group_size"
            )

    def scheme(self, shape: KvShape, layers: Sequence[LayerScheme] | None = None) -> KvScheme:
        """Return the cache's scheme.

        Args:
            shape: Shape of the model's cache.
            layers: Formats of each layer, where calibration chose them.

        Raises:
            ValueError: The model's heads cannot be stored so, or its context is too short.
        """
        keys, values = self._formats(shape)
        at_once = max(keys.tokens_at_once, values.tokens_at_once)
        if shape.context is not None and self.sinks + self.residual_length + at_once > shape.context:
            raise ValueError(
                f"{self.method} would store nothing in the model's context of {shape.context} tokens: {at_once} are "
                f"stored together, and {self.residual_length} recent ones and {self.sinks} first ones stay in 16 bit; "
                "lower group_size, residual_length or sinks"
            )
        layers = tuple(layers) if layers else ((HeadGroup(keys, values),),) * shape.layers
        scheme = KvScheme(self.method, layers, self.residual_length, self.sinks, self.rotation, pre_rope=self.pre_rope)
        scheme.check(shape.layers, shape.heads, shape.channels)
        return scheme

    def calibrate(self, capture: AttentionCapture, shape: KvShape) -> dict[str, Tensor]:
        """Calibrate one layer.

        Args:
            capture: Inputs of the layer's attention on the calibration set.
            shape: Shape of the model's cache.

        Returns:
            Static parameters `keys.B.scale` and so on, for each number of bits B that may be chosen; the rotations of
            keys and of values (H, C, C), where calibration finds them; relative squared errors of attention
            `error.keys` and `error.values` (H, choices of bits), where a budget is allocated, or else `error` (H,),
            where `max_error` is set.
        """
        calibration: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        for side, plain in zip(_SIDES, self._formats(shape), strict=True):
            rotation = self._rotation(capture, side, plain)
            if self.rotation == "attention" and rotation is not None:
                calibration[f"{_ROTATION}.{side}"] = rotation
            formats = [replace(plain, num_bits=bits) for bits in self._choices(plain)]
            static = self._static(capture, side, formats, rotation)
            for fmt, params in zip(formats, static, strict=True):
                calibration |= {f"{side}.{fmt.num_bits}.{name}": t for name, t in params.items()}
            if self.budget_bits is not None or self.max_error is not None:
                pairs = zip(formats, static, strict=True)
                errors[side] = torch.stack([attention_error(capture, side, f, s, rotation) for f, s in pairs], -1)
        if self.budget_bits is not None:
            calibration |= {f"error.{side}": error for side, error in errors.items()}
        elif self.max_error is not None:
            calibration["error"] = (errors["keys"] + errors["values"])[:, 0]
        return calibration

    def finish_calibration(
        self, shape: KvShape, calibrations: Sequence[Calibration]
    ) -> tuple[KvScheme, dict[str, Tensor]]:
        """Choose the scheme and its static parameters once all layers are calibrated.

        Args:
            shape: Shape of the model's cache.
            calibrations: What `calibrate` returned for each layer.

        Returns:
            The scheme, and static parameters by `LAYER.keys.GROUP.scale` and so on.
        """
        if self.budget_bits is not None:
            layers = self._allocate(shape, calibrations)
        else:
            layers = [self._layer(shape, calibration) for calibration in calibrations]
        static: dict[str, Tensor] = {}
        if self.rotation == "attention":
            for i, calibration in enumerate(calibrations):
                static |= {f"{i}.{ROTATIONS}.{side}": calibration[f"{_ROTATION}.{side}"].clone() for side in _SIDES}
        for i, layer in enumerate(layers):
            for g, group in enumerate(layer):
                for side, fmt in zip(_SIDES, (group.keys, group.values), strict=True):
                    params = _params_of(calibrations[i], f"{side}.{fmt.num_bits}.", group) if fmt.calibrated else {}
                    static |= {f"{i}.{side}.{g}.{name}": t for name, t in params.items()}
        return self.scheme(shape, layers), static

    def _rotation(self, capture: AttentionCapture, side: str, fmt: KvFormat) -> Tensor | None:
        """Return the rotation of a layer's keys, or values, (H or 1, C, C)."""
        if self.rotation == "attention":

            def error(rotation: Tensor) -> Tensor:
                static = self._static(capture, side, [fmt], rotation)[0]
                return attention_error(capture, side, fmt, static, rotation)

            return find_rotation(capture, side, fmt, error)
        rotations = layer_rotations(self.rotation, {}, (capture.keys.shape[-1], capture.values.shape[-1]))
        return rotations and rotations[_SIDES.index(side)].to(capture.keys.device)

    def _static(
        self, capture: AttentionCapture, side: str, formats: Sequence[KvFormat], rotation: Tensor | None
    ) -> list[StaticParams]:
        """Fit the static parameters of keys, or values, in each of the formats."""
        if not any(fmt.calibrated for fmt in formats):
            return [{} for _ in formats]
        x = capture.stored_keys if side == "keys" else capture.values
        x = x if rotation is None else rotate(x, rotation)
        weight = key_weight(capture, rotation) if side == "keys" else value_weight(capture)
        whole = x.shape[2] // formats[0].tokens_at_once * formats[0].tokens_at_once
        x, weight = x[:, :, :whole], weight[:, :, :whole]
        return [fit_static(fmt, x, weight, correction=self.level_correction) for fmt in formats]

    def _choices(self, fmt: KvFormat) -> Sequence[int]:
        return _CHOICES if self.budget_bits is not None else (fmt.num_bits,)

    def _layer(self, shape: KvShape, calibration: Calibration) -> LayerScheme:
        keys, values = self._formats(shape)
        in_16_bit = self.max_error is not None and float(calibration["error"].mean()) > self.max_error
        return (HeadGroup(_PLAIN, _PLAIN),) if in_16_bit else (HeadGroup(keys, values),)

    def _allocate(self, shape: KvShape, calibrations: Sequence[Calibration]) -> list[LayerScheme]:
        """Allocate the budget to the keys and the values of layers, or of heads."""
        assert self.budget_bits is not None
        tables: list[list[float]] = []
        for calibration in calibrations:
            for side in _SIDES:
                errors = calibration[f"error.{side}"]
                tables += (errors if self.per_head else errors.mean(0, keepdim=True)).tolist()
        bits = [_CHOICES[c] for c in allocate(tables, _CHOICES, self.budget_bits * len(tables))]
        heads = shape.heads if self.per_head else 1
        layers: list[LayerScheme] = []
        for i, calibration in enumerate(calibrations):
            of_layer = bits[2 * heads * i : 2 * heads * (i + 1)]
            pairs = list(zip(of_layer[:heads], of_layer[heads:], strict=True))
            if self.max_error is not None and self._error(calibration, pairs) > self.max_error:
                layers.append((HeadGroup(_PLAIN, _PLAIN),))
            else:
                layers.append(_group_heads(pairs, *self._formats(shape)))
        return layers

    def _error(self, calibration: Calibration, bits: Sequence[tuple[int, int]]) -> float:
        """Return the error of a layer whose keys and values have these bits; one pair for all heads unless per_head."""
        return sum(
            float(calibration[f"error.{s}"][h if self.per_head else slice(None), _CHOICES.index(p[i])].mean())
            / len(bits)
            for h, p in enumerate(bits)
            for i, s in enumerate(_SIDES)
        )


def _group_heads(bits: Sequence[tuple[int, int]], keys: KvFormat, values: KvFormat) -> LayerScheme:
    """Group the heads of a layer whose keys and values have the same bits."""
    groups = {pair: [h for h, p in enumerate(bits) if p == pair] for pair in sorted(set(bits))}
    return tuple(
        HeadGroup(replace(keys, num_bits=k), replace(values, num_bits=v), tuple(heads) if len(groups) > 1 else None)
        for (k, v), heads in groups.items()
    )


def _params_of(calibration: Calibration, prefix: str, group: HeadGroup) -> dict[str, Tensor]:
    """Return the static parameters under a prefix, those of each head cut to the heads of the group."""
    params: dict[str, Tensor] = {}
    for name, tensor in calibration.items():
        if name.startswith(prefix):
            for_all_heads = group.heads is None or len(tensor) == 1 or "levels" in name
            params[name.removeprefix(prefix)] = (tensor if for_all_heads else tensor[list(group.heads or ())]).clone()
    return params


def check_cache_is_last(stages: Sequence[Stage]) -> None:
    """Check that at most one stage treats the cache, and that no stage after it changes linears.

    Args:
        stages: Stages of a recipe, or of one walk.

    Raises:
        ValueError: More do, or one does.
    """
    caches = [i for i, stage in enumerate(stages) if isinstance(stage, CacheStage)]
    if len(caches) > 1 or any(isinstance(stage, WeightStage) for i in caches for stage in stages[i:]):
        raise ValueError(
            "a recipe has one stage for the cache, and it comes last, since it observes the compressed model; "
            f"these are {', '.join(s.method for s in stages)}"
        )
