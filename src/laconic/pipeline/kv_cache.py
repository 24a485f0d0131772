"""`laconic.kv_cache`: a quantized key-value cache for a model in memory, by the name of a method."""

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
from laconic.recipe import explain_error
from laconic.stages.cache import CacheStage


def kv_cache(model: PreTrainedModel, method: str = "kivi", **options: Any) -> KvCache:
    """Create an empty quantized key-value cache.

    Args:
        model: The model.
        method: Name of a cache method that needs no calibration.
        **options: Options of the method, as in a stage of a recipe.

    Returns:
        A cache for one call of `model.generate(..., cache=...)` (`past_key_values=` before transformers 5.24).

    Raises:
        ValueError: An option is invalid, the method needs calibration, or the model cannot have such a cache.
    """
    if not hasattr(model, "get_decoder"):
        raise ValueError(
            f"kv_cache needs a model in memory, such as laconic.load(...) returns, not {type(model).__name__}"
        )
    return make_cache(model, kv_scheme(model.config, {"method": method, **options}))


def kv_scheme(config: Any, stage: Mapping[str, Any]) -> KvScheme:
    """Return the scheme of a cache.

    Args:
        config: Config of the model.
        stage: Keys of a cache stage, as in a recipe.

    Raises:
        ValueError: An option is invalid, or the method needs calibration.
    """
    kinds: dict[str, Any] = {m.model_fields["method"].default: m for m in METHODS if issubclass(m, CacheStage)}
    kind: type[CacheStage] | None = kinds.get(str(stage.get("method")))
    if kind is None:
        raise ValueError(f"no cache method '{stage.get('method')}'; choose one of {', '.join(kinds)}")
    try:
        validated = kind.model_validate(dict(stage))
    except ValidationError as e:
        raise ValueError(explain_error(e, "cache", lambda _: list(kind.model_fields))) from e
    if validated.needs.calibration:
        raise ValueError(
            f"{validated.method} is calibrated; make an artifact by 'laconic compress', and open or eval that"
        )
    return validated.scheme(kv_shape(config))
