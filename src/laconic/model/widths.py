"""Models whose blocks differ in width, which no stock config can say.

`model_type: laconic` in config.json; `laconic_base` is the stock model's type, and `laconic_widths` has for each block
the keys of the config that it has a value of its own for. Nothing here knows an architecture: the stock model is built,
and then each of its blocks anew from the config that it would have alone. transformers opens such a model after
`import laconic`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import configuration_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONFIG_MAPPING_NAMES: Mapping[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
MODEL_TYPE, BASE, WIDTHS, _PREFIX = "laconic", "laconic_base", "laconic_widths", "Laconic"


class OfBlock:
    """The config of one block: the model's own, as it is at any time, but for the block's widths."""

    def __init__(self, config: Any, widths: Mapping[str, int]) -> None:
        self._config = config
        self._widths = {config.attribute_map.get(key, key): value for key, value in widths.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_widths"):  # asked for while being copied
            raise AttributeError(name)
        name = self._config.attribute_map.get(name, name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)


class LaconicConfig(PretrainedConfig):
    """What config.json is read by: gives the config of the stock model's kind."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = config_dict.get(BASE)
        if base not in CONFIG_MAPPING_NAMES or not isinstance(config_dict.get(WIDTHS), list):
            raise ValueError(f"config.json says model_type '{MODEL_TYPE}', and not {BASE} and {WIDTHS} with it")
        return config_class(base).from_dict(config_dict, **kwargs)


@cache
def config_class(base: str) -> type[PretrainedConfig]:
    """The config of a stock model's type with widths by block, its model registered with transformers."""
    stock = CONFIG_MAPPING[base]
    kind = type(f"{_PREFIX}{stock.__name__}", (stock,), {"model_type": MODEL_TYPE, "__module__": __name__})
    if stock in AutoModelForCausalLM._model_mapping:
        model: Any = AutoModelForCausalLM._model_mapping[stock]
        own = _model_class(model, kind)
        AutoModelForCausalLM.register(kind, own)
        # Checkpoints have the names and stacks that transformers converts for the stock model.
        conversions = get_checkpoint_conversion_mapping(model.__name__) or get_checkpoint_conversion_mapping(base)
        if conversions:
            register_checkpoint_conversion_mapping(own.__name__, conversions, overwrite=True)
    return kind


def make_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of the keys of a config.json. Raises: ValueError where it makes nothing of them."""
    kind = CONFIG_MAPPING[raw["model_type"]]
    return kind.from_dict(copy.deepcopy(dict(raw)))


def with_widths(raw: Mapping[str, Any], widths: list[dict[str, int]]) -> dict[str, Any]:
    """The keys of a config.json, as they are with such widths of each block, beside those it has already."""
    before = raw.get(WIDTHS) or [{} for _ in widths]
    names = [n if n.startswith(_PREFIX) else f"{_PREFIX}{n}" for n in raw.get("architectures") or ()]
    return {
        **raw,
        "model_type": MODEL_TYPE,
        "architectures": names,
        BASE: raw.get(BASE, raw["model_type"]),
        WIDTHS: [{**old, **new} for old, new in zip(before, widths, strict=True)],
    }


def block_config(config: Any, i: int) -> Any:
    """The config by which block i of a model was built."""
    widths = getattr(config, WIDTHS, None)
    return OfBlock(config, widths[i]) if widths else config


def _model_class(stock: type[Any], kind: type[PretrainedConfig]) -> type[Any]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        count = len(getattr(config, WIDTHS))
        blocks: Any = next(m for m in self.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        for i, block in enumerate(blocks):
            blocks[i] = type(block)(block_config(config, i), i)

    name = f"{_PREFIX}{stock.__name__}"
    return type(name, (stock,), {"__init__": __init__, "config_class": kind, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """Classes by their names, for pickles of them."""
    stock = name.removeprefix(_PREFIX)
    base = next((t for t, n in CONFIG_MAPPING_NAMES.items() if n == stock and stock != name), None)
    if base is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return config_class(base)


AutoConfig.register(MODEL_TYPE, LaconicConfig)
