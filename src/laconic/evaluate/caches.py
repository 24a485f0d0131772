"""Which caches are measured: transformers' own, the artifact's, and any that is asked for by `--kv`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from transformers import Cache, PreTrainedModel

from laconic.evaluate.names import slug
from laconic.evaluate.through_cache import PLAIN, plain_cache
from laconic.kv.open import kv_shape, make_cache
from laconic.kv.scheme import KvScheme
from laconic.pipeline.kv_cache import kv_scheme


def caches_for(model: PreTrainedModel, asked: Sequence[str] = ()) -> dict[str, Callable[[], Cache]]:
    """By name, what makes a new cache for a model: `16 bit`, that of the artifact where it has one, those asked for.

    asked: of each, YAML or JSON in the form of a recipe's stage, `{method: kivi, k_bits: 2, v_bits: 2}`.
    Raises: ValueError when one cannot be read, or the model cannot have it.
    """
    kv_shape(model.config)  # says of a model that caches something else
    made: dict[str, Callable[[], Cache]] = {PLAIN: partial(plain_cache, model)}
    own: KvScheme | None = vars(model).get("kv_scheme")
    if own is not None:
        made[f"artifact ({own.method})"] = partial(make_cache, model, own, vars(model).get("kv_calibrated"))
    for text in asked:
        given = read_stage(text)
        made[title(given)] = partial(make_cache, model, resolve(given, model.config))
    for new_cache in made.values():
        new_cache()  # says what is wrong now rather than in an hour
    return made


def read_stage(text: str) -> dict[str, Any]:
    """A `--kv` as keys and values. Raises: ValueError when it has not the form of a stage."""
    example = "as in --kv '{method: kivi, k_bits: 2, v_bits: 2}'"
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"--kv {text} is no YAML: {e}; write it {example}") from e
    if not isinstance(given, dict) or not isinstance(given.get("method"), str):
        raise ValueError(f"--kv {text} names no method; write it {example}")
    return given


def title(given: Mapping[str, Any]) -> str:
    """A stage in a few words: `kivi k_bits 2 v_bits 2`."""
    return " ".join([given["method"], *(f"{key} {value}" for key, value in given.items() if key != "method")])


def of_caches(asked: Sequence[str]) -> str:
    """Of `--kv`s, for the name of a result, so that runs of other caches do not replace one another."""
    return "-" + slug(map(title, map(read_stage, asked)), "-") if asked else ""


def resolve(given: Mapping[str, Any], config: Any) -> KvScheme:
    """The scheme that a stage asks for, of a model of this config.

    Raises: ValueError for a method that is unknown or has no such key, or one that wants to be calibrated.
    """
    try:
        return kv_scheme(config, given)
    except ValueError as e:
        raise ValueError(f"--kv {title(given)}: {e}") from e
