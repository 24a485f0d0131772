"""A quantized cache for a plain model, by a method's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel

from laconic.kv.attach import make_cache
from laconic.kv.cache import KvCache
from laconic.kv.scheme import KvScheme
from laconic.kv.shape import kv_shape
from laconic.methods import METHODS
from laconic.stages.cache import CacheStage


def kv_cache(model: PreTrainedModel, method: str = "kivi", **options: Any) -> KvCache:
    """A new cache for one call of `model.generate(..., cache=...)` (`past_key_values=` before transformers 5.24).

    method, options: as a stage of a recipe has them. Raises: ValueError for what a recipe would refuse, for a method
    that needs calibration, and for a model that cannot have such a cache.
    """
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"kv_cache wants an open model, as laconic.load(...) gives it, not {type(model).__name__}")
    return make_cache(model, kv_scheme(model.config, {"method": method, **options}))


def kv_scheme(config: Any, stage: Mapping[str, Any]) -> KvScheme:
    """The scheme that a stage, given as a mapping, gives the cache of a model of this config. Raises: ValueError."""
    kinds: dict[str, Any] = {m.model_fields["method"].default: m for m in METHODS if issubclass(m, CacheStage)}
    kind: type[CacheStage] | None = kinds.get(str(stage.get("method")))
    if kind is None:
        raise ValueError(f"no cache method '{stage.get('method')}'; choose one of {', '.join(kinds)}")
    try:
        made = kind.model_validate(dict(stage))
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        where = ".".join(map(str, (stage["method"], *problem["loc"])))
        raise ValueError(f"{where}: {problem['msg']}") from e
    if made.needs.calibration:
        raise ValueError(f"{made.method} is calibrated; make an artifact by 'laconic compress', and open or eval that")
    return made.scheme(kv_shape(config))
