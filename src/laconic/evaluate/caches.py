"""Which caches are measured: transformers' own, the artifact's, and any that is asked for by `--kv`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import Cache, PreTrainedModel

from laconic.engine.cache_stage import CacheStage
from laconic.evaluate.through_cache import PLAIN, plain_cache
from laconic.formats.kv_scheme import KvScheme
from laconic.methods import METHODS
from laconic.model.kv_open import KvShape, kv_shape, make_cache


def caches_for(model: PreTrainedModel, asked: Sequence[str] = ()) -> dict[str, Callable[[], Cache]]:
    """By name, what makes a new cache for a model: `16 bit`, that of the artifact where it has one, those asked for.

    asked: of each, YAML or JSON in the form of a recipe's stage, `{method: kivi, k_bits: 2, v_bits: 2}`.
    Raises: ValueError when one cannot be read, or the model cannot have it.
    """
    shape = kv_shape(model.config)
    made: dict[str, Callable[[], Cache]] = {PLAIN: partial(plain_cache, model)}
    own: KvScheme | None = vars(model).get("kv_scheme")
    if own is not None:
        made[f"artifact ({own.method})"] = partial(make_cache, model, own, vars(model).get("kv_calibrated"))
    for text in asked:
        given = read_stage(text)
        made[title(given)] = partial(make_cache, model, resolve(given, shape))
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


def slug(asked: Sequence[str]) -> str:
    """Of `--kv`s, for the name of a result, so that runs of other caches do not replace one another."""
    return "".join("-" + re.sub(r"[^\w.+-]+", "_", title(read_stage(text))) for text in asked)[:150]


def resolve(given: Mapping[str, Any], shape: KvShape) -> KvScheme:
    """The scheme that a stage asks for, of a model whose cache has this shape.

    Raises: ValueError for a method that is unknown or has no such key, or one that wants to be calibrated.
    """
    kinds: dict[str, Any] = {m.model_fields["method"].default: m for m in METHODS if issubclass(m, CacheStage)}
    if (kind := kinds.get(given["method"])) is None:
        raise ValueError(f"--kv: there is no method '{given['method']}' of a cache; there is {', '.join(kinds)}")
    try:
        stage: CacheStage = kind(**given)
    except ValidationError as e:
        told = "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}".removeprefix(": ") for d in e.errors())
        raise ValueError(f"--kv {title(given)}: {told}") from e
    if stage.observes:
        raise ValueError(
            f"--kv {title(given)}: it is calibrated; make an artifact by 'laconic compress', and eval that"
        )
    return stage.scheme(shape)
