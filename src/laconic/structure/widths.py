"""Models whose blocks differ in width, which the config of a stock model cannot describe.

In config.json, `model_type` is `laconic`, `laconic_base` is the stock model's type, and `laconic_widths` has for each
block the config keys whose values differ there. No architecture is named: the stock model is built, and then each of
its blocks is rebuilt from the config that it would have alone. transformers opens such a model after `import laconic`.

In some models the attention is by its class as wide as the residual stream. There a key applies to a submodule of the
block alone (`self_attn.hidden_size`): the submodule is built from a config with this key, and its linears are then
widened to read and write the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined]
    CONFIG_MAPPING_NAMES as CONFIG_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from laconic.structure.config_keys import BASE, MODEL_TYPE, WIDTHS

_PREFIX = "Laconic"


class BlockConfig:
    """Config of one block: a view of the model's config with the widths of this block.

    Args:
        config: Config of the model; later changes of it show in the view.
        widths: Values of this block by config key.
    """

    def __init__(self, config: Any, widths: Mapping[str, int]) -> None:
        self._config = config
        self._widths = {config.attribute_map.get(key, key): value for key, value in widths.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_widths"):  # looked up while an instance is copied
            raise AttributeError(name)
        name = self._config.attribute_map.get(name, name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)


@cache
def config_class(base: str) -> type[PretrainedConfig]:
    """Make the config class of a stock model type with widths by block, and register its model with transformers.

    Args:
        base: `model_type` of the stock model, one that transformers knows.

    Returns:
        A subclass of the stock config, one for each type.
    """
    stock = CONFIG_MAPPING[base]
    kind = type(f"{_PREFIX}{stock.__name__}", (stock,), {"model_type": MODEL_TYPE, "__module__": __name__})
    if stock in AutoModelForCausalLM._model_mapping:
        model: Any = AutoModelForCausalLM._model_mapping[stock]
        model_class = _model_class(model, kind)
        AutoModelForCausalLM.register(kind, model_class)
        # Checkpoints need the same conversion (renamed tensors, stacked experts) as those of the stock model.
        conversions = get_checkpoint_conversion_mapping(model.__name__) or get_checkpoint_conversion_mapping(base)
        if conversions:
            register_checkpoint_conversion_mapping(model_class.__name__, conversions, overwrite=True)
    return kind


def make_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """Build the transformers config from the contents of a config.json.

    Args:
        raw: Contents of config.json.

    Returns:
        The config, of the class that transformers has for its `model_type`.

    Raises:
        ValueError: transformers rejects the contents.
    """
    kind = CONFIG_MAPPING[raw["model_type"]]
    return kind.from_dict(copy.deepcopy(dict(raw)))


def add_widths(raw: Mapping[str, Any], widths: list[dict[str, int]]) -> dict[str, Any]:
    """Add widths of each block to the contents of a config.json.

    Args:
        raw: Contents of config.json, perhaps with widths already.
        widths: For each block, values by config key.

    Returns:
        The new contents; values already present for other keys remain.
    """
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
    """Build block i of a model with its own widths.

    Args:
        kind: Class of the block.
        config: Config of the model.
        widths: Values by config key, or by submodule and key (`self_attn.hidden_size`) for one submodule alone. The
            last linear of such a submodule is taken to write the residual stream, the others to read it.
        i: Number of the block.

    Returns:
        The block, with weights as its class initializes them.
    """
    make: Any = kind
    block_widths = {key: width for key, width in widths.items() if "." not in key}
    block: nn.Module = make(BlockConfig(config, block_widths), i)
    by_submodule: dict[str, dict[str, int]] = {}
    for key in widths.keys() - block_widths.keys():
        path, _, leaf = key.rpartition(".")
        by_submodule.setdefault(path, {})[leaf] = widths[key]
    for path, submodule_widths in by_submodule.items():
        submodule = make(BlockConfig(config, block_widths | submodule_widths), i).get_submodule(path)
        _widen_to_stream(submodule, block.get_submodule(path))
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, submodule)
    return block


def block_configs(config: Any) -> list[Any]:
    """Make the config of each block's attention.

    Args:
        config: Config of the model.

    Returns:
        One config for each block; a single one if the model has no widths by block.
    """
    widths: Sequence[Mapping[str, int]] = getattr(config, WIDTHS, None) or ({},)
    return [BlockConfig(config, {key.rpartition(".")[2]: width for key, width in block.items()}) for block in widths]


def _widen_to_stream(submodule: nn.Module, stock: nn.Module) -> None:
    """Set each linear to the stock submodule's residual width on the side that reads or writes the residual stream."""
    linears = [(name, m) for name, m in submodule.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for name, linear in linears:
        (inputs, outputs), (stock_inputs, stock_outputs) = _features(linear), _features(stock.get_submodule(name))
        features = (inputs, stock_outputs) if linear is linears[-1][1] else (stock_inputs, outputs)
        parent, _, leaf = name.rpartition(".")
        setattr(submodule.get_submodule(parent), leaf, _resized(linear, *features))


def _features(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)  # type: ignore[return-value]


def _resized(linear: nn.Linear | Conv1D, inputs: int, outputs: int) -> nn.Module:
    """Build a linear of the same class with other numbers of inputs and outputs."""
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
    """Look up the config classes by name, so that they can be unpickled."""
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    stock = name.removeprefix(_PREFIX)
    base = next((t for t, n in CONFIG_MAPPING_NAMES.items() if n == stock), None)
    if base is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return config_class(base)
