"""Models whose blocks differ in width (`structure.widths`), in vLLM.

While vLLM's own model builds a block, the config holds that block's widths; vLLM gives every attention layer a cache of
its own shape. Nothing else is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS
from vllm.model_executor.models.utils import make_layers

from laconic.structure.config_keys import BASE, WIDTHS

# Models that are tested; more may work.
_SERVED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
_PREFIX = "Laconic"


def register_widths() -> None:
    """Register vLLM's models with widths by block, by name: vLLM imports each when it is needed."""
    for name in _SERVED:
        if name in _TEXT_GENERATION_MODELS:
            ModelRegistry.register_model(f"{_PREFIX}{name}", f"{__name__}:{_PREFIX}{name}")


@cache
def _model_class(name: str) -> type[Any]:
    module, stock_name = _TEXT_GENERATION_MODELS[name]
    imported = __import__(f"vllm.model_executor.models.{module}", fromlist=[stock_name])
    stock = getattr(imported, stock_name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        with _block_widths(vllm_config.model_config.hf_config):
            stock.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)

    return type(f"{_PREFIX}{name}", (stock,), {"__init__": __init__, "__module__": __name__})


@contextmanager
def _block_widths(config: Any) -> Iterator[None]:
    """Make `make_layers` build each layer with its own widths in the config, while the context lasts."""

    def make(count: int, build: Callable[..., Any], prefix: str) -> Any:
        def build_block(prefix: str) -> Any:
            widths = config.__dict__[WIDTHS][int(prefix.rpartition(".")[2])]
            before = {key: getattr(config, key, None) for key in widths}
            for key, value in widths.items():
                setattr(config, key, value)
            try:
                layer = build(prefix=prefix)
            finally:
                for key, value in before.items():
                    setattr(config, key, value)
            _check_heads(layer, config)
            return layer

        return make_layers(count, build_block, prefix)

    models = [m for n, m in sys.modules.items() if n.startswith("vllm.model_executor.models.")]
    using = [
        m for m in models if getattr(m, "make_layers", None) is make_layers and m.__name__ != make_layers.__module__
    ]
    for module in using:
        vars(module)["make_layers"] = make
    try:
        yield
    finally:
        for module in using:
            vars(module)["make_layers"] = make_layers


def _check_heads(layer: Any, config: Any) -> None:
    """Check that vLLM has the width of a head right, which it may compute from a block's number of heads.

    Raises:
        ValueError: It has not.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if any(m.head_size != head_dim for m in layer.modules() if isinstance(m, Attention)):
        raise ValueError(
            f"vLLM computes the width of a head of '{getattr(config, BASE)}' from the number of heads, which differs; "
            "prune with groups: [mlp], or open it with transformers"
        )


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(_PREFIX)
    if stock == name or stock not in _SERVED:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _model_class(stock)
