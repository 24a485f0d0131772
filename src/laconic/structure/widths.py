"""Models whose blocks differ in width, which no stock config can say.

`model_type: laconic` in config.json; `laconic_base` is the stock model's type, and `laconic_widths` has for each block
the keys of the config that it has a value of its own for. Nothing here knows an architecture: the stock model is built,
and then each of its blocks anew from the config that it would have alone. transformers opens such a model after
`import laconic`.

Where an attention is as wide as the residual stream by its class, a key is said to it alone (`self_attn.hidden_size`):
that part of the block is built from a config with this key, and then reads and puts out the stream as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import configuration_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from laconic.structure.model_type import MODEL_TYPE

CONFIG_MAPPING_NAMES: Mapping[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
BASE, WIDTHS, _PREFIX = "laconic_base", "laconic_widths", "Laconic"


class BlockConfig:
    """The config of one block: the model's own, as it is at any time, but for the block's widths."""

    def __init__(self, config: Any, widths: Mapping[str, int]) -> None:
        self._config = config
        self._widths = {config.attribute_map.get(key, key): value for key, value in widths.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_widths"):  # asked for while being copied
            raise AttributeError(name)
        name = self._config.attribute_map.get(name, name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)


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


def add_widths(raw: Mapping[str, Any], widths: list[dict[str, int]]) -> dict[str, Any]:
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


def build_block(kind: type[nn.Module], config: Any, widths: Mapping[str, int], i: int) -> nn.Module:
    """Block i of a model, of this class, with widths of its own.

    widths: by key of the config; by part and key (`self_attn.hidden_size`) where only a part of the block is told it.
    The last linear of such a part is taken to put out the residual stream, and the others to read it.
    """
    make: Any = kind
    own = {key: width for key, width in widths.items() if "." not in key}
    block: nn.Module = make(BlockConfig(config, own), i)
    told: dict[str, dict[str, int]] = {}
    for key in widths.keys() - own.keys():
        path, _, leaf = key.rpartition(".")
        told.setdefault(path, {})[leaf] = widths[key]
    for path, inside in told.items():
        part = make(BlockConfig(config, own | inside), i).get_submodule(path)
        _widen_to_stream(part, block.get_submodule(path))
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, part)
    return block


def block_configs(config: Any) -> list[Any]:
    """The config that each block's attention is built from; one for all, where these do not differ."""
    widths: Sequence[Mapping[str, int]] = getattr(config, WIDTHS, None) or ({},)
    return [BlockConfig(config, {key.rpartition(".")[2]: width for key, width in own.items()}) for own in widths]


def _widen_to_stream(part: nn.Module, stock: nn.Module) -> None:
    """Give the linears of a part the side that is the residual stream's, as wide as the stock part's."""
    linears = [(name, m) for name, m in part.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for name, linear in linears:
        (inputs, outputs), (stock_inputs, stock_outputs) = _sides(linear), _sides(stock.get_submodule(name))
        sides = (inputs, stock_outputs) if linear is linears[-1][1] else (stock_inputs, outputs)
        parent, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(parent), leaf, _like(linear, *sides))


def _sides(linear: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear has."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)  # type: ignore[return-value]


def _like(linear: nn.Linear | Conv1D, inputs: int, outputs: int) -> nn.Module:
    if isinstance(linear, Conv1D):
        return Conv1D(outputs, inputs)
    return type(linear)(inputs, outputs, bias=linear.bias is not None)


def _model_class(stock: type[Any], kind: type[PretrainedConfig]) -> type[Any]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        count = len(getattr(config, WIDTHS))
        blocks: Any = next(m for m in self.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        for i, block in enumerate(blocks):
            blocks[i] = build_block(type(block), config, getattr(config, WIDTHS)[i], i)

    name = f"{_PREFIX}{stock.__name__}"
    return type(name, (stock,), {"__init__": __init__, "config_class": kind, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """Classes by their names, for pickles of them."""
    stock = name.removeprefix(_PREFIX)
    base = next((t for t, n in CONFIG_MAPPING_NAMES.items() if n == stock and stock != name), None)
    if base is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return config_class(base)
