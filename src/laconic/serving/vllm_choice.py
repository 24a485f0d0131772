"""Choice of vLLM's attention backend: ours for models with a packed cache, vLLM's own for all others.

On a CPU our backend replaces vLLM's, and forwards every other model to it. On other platforms vLLM chooses among
several backends, once for equal arguments; ours is chosen before that, for models with a packed cache. A layer of such
a model that has another backend all the same is an error.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from laconic.checkpoint.files import KV_CONFIG
from laconic.serving.vllm_kv import PackedBackend, PackedImpl, scheme_of


def register_kv() -> None:
    """Register the backend with vLLM; may be called again."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{PackedBackend.__module__}.{PackedBackend.__name__}")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.CpuBackend")
    else:
        choose_packed_backend(selector)
    for layer_class in (Attention, MLAAttention):
        refuse_other_backends(layer_class)


def choose_packed_backend(selector: Any) -> None:
    """Make vLLM choose our backend for models with a packed cache; may be called again.

    vLLM keeps its choice for every set of arguments, and the model is none of them: without this a packed cache gets
    the backend that a model without one had before it in the same process.

    Args:
        selector: vLLM's module, whose `_cached_get_attn_backend` is replaced.
    """
    vllm_choice = selector._cached_get_attn_backend
    if getattr(vllm_choice, "laconic", False):
        return

    def choose(backend: Any, *args: Any, **kwargs: Any) -> type[AttentionBackend]:
        if scheme_of(get_current_vllm_config()) is None:
            vllm_backend: type[AttentionBackend] = vllm_choice(backend, *args, **kwargs)
            return vllm_backend
        if backend not in (None, AttentionBackendEnum.CUSTOM):
            raise _another_backend(backend.name)
        return PackedBackend

    vars(choose)["laconic"] = True
    selector._cached_get_attn_backend = choose


def refuse_other_backends(layer_class: Any) -> None:
    """Make a class of vLLM's attention layers refuse to be built for a packed cache without our backend.

    Args:
        layer_class: Class whose `__init__` is replaced; may be given again.
    """
    build = layer_class.__init__
    if getattr(build, "laconic", False):
        return

    @functools.wraps(build)
    def build_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if scheme_of(get_current_vllm_config()) is not None and not isinstance(self.impl, PackedImpl):
            raise _another_backend(self.attn_backend.get_name())

    vars(build_checked)["laconic"] = True
    layer_class.__init__ = build_checked


def _another_backend(name: str) -> ValueError:
    return ValueError(
        f"this artifact has a packed cache, and {name} stores keys and values in 16 bit; leave out "
        f"--attention-backend, or drop {KV_CONFIG} from config.json"
    )


class CpuBackend(CPUAttentionBackend):
    """Backend of CPUs: vLLM's, unless the model that is being built has a packed cache."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        packed = scheme_of(get_current_vllm_config()) is not None
        return PackedImpl if packed else CPUAttentionBackend.get_impl_cls()
