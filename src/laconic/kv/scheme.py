"""A cache's scheme: the formats of keys and values of every head of every layer, and what stays in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from laconic.kv.format import KvFormat


@dataclass(frozen=True)
class HeadGroup:
    """heads: the key-value heads meant, all when None. keys, values: how they are stored."""

    keys: KvFormat
    values: KvFormat
    heads: tuple[int, ...] | None = None


Layer = tuple[HeadGroup, ...]


@dataclass(frozen=True)
class KvScheme:
    """method: what chose it. layers: of each decoder layer its groups of heads. residual_length: at least so many of
    the most recent tokens are in 16 bit. sinks: so many of a sequence's first tokens are too. rotation: of the channels
    of keys and values, before they are rounded. pre_rope: keys are stored as they were before their rotary embedding.
    fingerprint: of the model it was calibrated on."""

    method: str
    layers: tuple[Layer, ...]
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
        """Whether calibration fixed something of it."""
        formats = (f for layer in self.layers for g in layer for f in (g.keys, g.values))
        return self.rotation == "attention" or any(f.calibrated for f in formats)

    def check(self, layers: int, heads: int, channels: int) -> None:
        """Raises: ValueError when a model of these many layers, key-value heads and channels a head cannot have it."""
        if len(self.layers) != layers:
            raise ValueError(f"the cache's scheme is of {len(self.layers)} layers, the model has {layers}")
        if self.rotation == "hadamard" and channels & (channels - 1):
            raise ValueError(
                f"rotation: hadamard wants heads of a power of two channels, and these have {channels}; leave it out, "
                "or set rotation: attention"
            )
        for layer in self.layers:
            named = [h for group in layer for h in (range(heads) if group.heads is None else group.heads)]
            if sorted(named) != list(range(heads)):
                raise ValueError(f"the cache's scheme does not name each of the model's {heads} key-value heads once")
            for group in layer:
                group.keys.check(channels)
                group.values.check(channels)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KvScheme:
        """The inverse of `to_dict`. Raises: ValueError when something is missing or unknown."""
        try:
            layers = tuple(tuple(_group(g) for g in layer) for layer in data["layers"])
            return cls(**{**data, "layers": layers})
        except (KeyError, TypeError) as e:
            raise ValueError(f"the cache's scheme in config.json cannot be read: {e}") from e


def uniform(method: str, keys: KvFormat, values: KvFormat, layers: int, **rest: Any) -> KvScheme:
    """The same formats in every layer and head."""
    return KvScheme(method, ((HeadGroup(keys, values),),) * layers, **rest)


def tokens_at_once(layer: Sequence[HeadGroup]) -> int:
    """How many tokens have to be there before a layer can store them."""
    return math.lcm(*(f.tokens_at_once for group in layer for f in (group.keys, group.values)))


def _group(data: dict[str, Any]) -> HeadGroup:
    heads = data.get("heads")
    return HeadGroup(KvFormat(**data["keys"]), KvFormat(**data["values"]), None if heads is None else tuple(heads))
