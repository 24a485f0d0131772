"""A cache's scheme: the formats of keys and values of every head of every layer, and which tokens stay in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from laconic.kv.format import KvFormat

ROTATIONS = "turn.0"
"""Name of a layer's rotations among its static parameters, as files of artifacts have it."""


@dataclass(frozen=True)
class HeadGroup:
    """The formats of some heads of a layer.

    Attributes:
        keys: Format of their keys.
        values: Format of their values.
        heads: Key-value heads of the group; all of the layer if None.
    """

    keys: KvFormat
    values: KvFormat
    heads: tuple[int, ...] | None = None


LayerScheme = tuple[HeadGroup, ...]
"""The groups of heads of one layer; together they name each of its key-value heads once."""


@dataclass(frozen=True)
class KvScheme:
    """Storage of a whole model's key-value cache.

    Attributes:
        method: Name of the method that chose it.
        layers: Groups of heads of each decoder layer.
        residual_length: Smallest number of most recent tokens in 16 bit.
        sinks: Number of a sequence's first tokens in 16 bit.
        rotation: Rotation of the channels of keys and values before they are rounded.
        pre_rope: Whether keys are stored as they were before their rotary embedding.
        fingerprint: Fingerprint of the model on which it was calibrated (`kv.attach.fingerprint`).
    """

    method: str
    layers: tuple[LayerScheme, ...]
    residual_length: int = 0
    sinks: int = 0
    rotation: Literal["hadamard", "attention"] | None = None
    pre_rope: bool = False
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.residual_length < 0 or self.sinks < 0:
            raise ValueError("residual_length and sinks are counts of tokens, 0 or more")

    @property
    def calibrated(self) -> bool:
        """Whether the scheme needs static parameters from calibration."""
        formats = (f for layer in self.layers for g in layer for f in (g.keys, g.values))
        return self.rotation == "attention" or any(f.calibrated for f in formats)

    def check(self, layers: int, heads: int, channels: int) -> None:
        """Check that a model can have this cache.

        Args:
            layers: Decoder layers of the model.
            heads: Key-value heads of a layer.
            channels: Channels of a head.

        Raises:
            ValueError: The model cannot have it.
        """
        if len(self.layers) != layers:
            raise ValueError(
                f"the cache's scheme has {len(self.layers)} layers and the model {layers}; compress this model to get "
                "a scheme of its own"
            )
        if self.rotation == "hadamard" and channels & (channels - 1):
            raise ValueError(
                f"rotation: hadamard needs heads of a power of two channels, and these have {channels}; leave it out, "
                "or set rotation: attention"
            )
        for layer in self.layers:
            named = [h for group in layer for h in (range(heads) if group.heads is None else group.heads)]
            if sorted(named) != list(range(heads)):
                raise ValueError(
                    f"the cache's scheme does not name each of the model's {heads} key-value heads once; compress this "
                    "model to get a scheme of its own"
                )
            for group in layer:
                group.keys.check(channels)
                group.values.check(channels)

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme as a dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KvScheme:
        """Invert `to_dict`.

        Args:
            data: The dict, as JSON decodes it.

        Returns:
            The scheme.

        Raises:
            ValueError: A key is missing or unknown, or a value is out of range.
        """
        try:
            layers = tuple(tuple(_head_group(g) for g in layer) for layer in data["layers"])
            return cls(**{**data, "layers": layers})
        except (KeyError, TypeError) as e:
            raise ValueError(
                f"the cache's scheme in config.json cannot be read ({e}); copy the file again, or compress again"
            ) from e


def uniform(method: str, keys: KvFormat, values: KvFormat, layers: int, **options: Any) -> KvScheme:
    """Make a scheme with the same formats in every layer and head.

    Args:
        method: Name of the method.
        keys: Format of all keys.
        values: Format of all values.
        layers: Number of decoder layers.
        **options: Other fields of `KvScheme`.

    Returns:
        The scheme.
    """
    return KvScheme(method, ((HeadGroup(keys, values),),) * layers, **options)


def tokens_at_once(layer: Sequence[HeadGroup]) -> int:
    """Return the number of tokens that a layer encodes together.

    Args:
        layer: Groups of heads of the layer.
    """
    return math.lcm(*(f.tokens_at_once for group in layer for f in (group.keys, group.values)))


def _head_group(data: dict[str, Any]) -> HeadGroup:
    heads = data.get("heads")
    return HeadGroup(KvFormat(**data["keys"]), KvFormat(**data["values"]), None if heads is None else tuple(heads))
