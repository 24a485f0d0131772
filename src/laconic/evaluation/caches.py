"""The caches to measure: transformers' own, the artifact's, and those of `--kv`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from transformers import Cache, PreTrainedModel

from laconic.evaluation.file_names import slug
from laconic.evaluation.through_cache import PLAIN, plain_cache
from laconic.kv.attach import make_cache
from laconic.kv.scheme import KvScheme
from laconic.kv.shape import kv_shape
from laconic.pipeline.kv_cache import kv_scheme


def caches_for(model: PreTrainedModel, kv: Sequence[str] = ()) -> dict[str, Callable[[], Cache]]:
    """Return constructors of the caches to measure: `16 bit`, the artifact's if it has one, and those of `--kv`.

    Args:
        model: The model.
        kv: Stages of a recipe as YAML or JSON, such as `{method: kivi, k_bits: 2, v_bits: 2}`.

    Returns:
        By name, a function that makes a new, empty cache.

    Raises:
        ValueError: A stage cannot be read, or does not fit the model.
    """
    kv_shape(model.config)  # Raises if the model does not cache keys and values.
    caches: dict[str, Callable[[], Cache]] = {PLAIN: partial(plain_cache, model)}
    scheme: KvScheme | None = vars(model).get("kv_scheme")
    if scheme is not None:
        caches[f"artifact ({scheme.method})"] = partial(make_cache, model, scheme, vars(model).get("kv_static"))
    for text in kv:
        stage = parse_stage(text)
        caches[title(stage)] = partial(make_cache, model, resolve(stage, model.config))
    for new_cache in caches.values():
        new_cache()  # Raises now, instead of after hours of measuring.
    return caches


def parse_stage(text: str) -> dict[str, Any]:
    """Parse the text of a `--kv`.

    Args:
        text: A stage as YAML or JSON, such as `{method: kivi, k_bits: 2, v_bits: 2}`.

    Returns:
        Keys and values of the stage, `method` among them.

    Raises:
        ValueError: The text is not YAML, or not a mapping with a text under `method`.
    """
    example = "as in --kv '{method: kivi, k_bits: 2, v_bits: 2}'"
    try:
        stage = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"--kv {text} is not YAML: {e}; write it {example}") from e
    if not isinstance(stage, dict) or not isinstance(stage.get("method"), str):
        raise ValueError(f"--kv {text} names no method; write it {example}")
    return stage


def title(stage: Mapping[str, Any]) -> str:
    """Return a short name of a stage, such as `kivi k_bits 2 v_bits 2`.

    Args:
        stage: Keys and values of a stage, `method` among them.
    """
    return " ".join([stage["method"], *(f"{key} {value}" for key, value in stage.items() if key != "method")])


def cache_suffix(kv: Sequence[str]) -> str:
    """Return the part of a result's name that differs between runs with other caches.

    Args:
        kv: Texts of the `--kv` options; none of them gives an empty suffix.

    Raises:
        ValueError: A text does not have the form of a stage.
    """
    return "-" + slug(map(title, map(parse_stage, kv)), "-") if kv else ""


def resolve(stage: Mapping[str, Any], config: Any) -> KvScheme:
    """Return the scheme of a stage for a model of this config.

    Args:
        stage: Keys and values of a stage, `method` among them.
        config: The transformers config of the model.

    Raises:
        ValueError: The method is unknown, has no such key, or needs calibration.
    """
    try:
        return kv_scheme(config, stage)
    except ValueError as e:
        raise ValueError(f"--kv {title(stage)}: {e}") from e
