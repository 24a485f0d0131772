"""Runs in vLLM's own environment: what becomes of the choice among backends, once our plugin is there.

usage: python choose_backend.py MODEL_WITH_A_PACKED_CACHE MODEL_WITHOUT OUT.json
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any


def main() -> None:
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from laconic.serving import vllm_plugin
    from laconic.serving.vllm_choice import choose_packed_backend

    vllm_plugin.register()
    # As vLLM's, it remembers its choice; models are not among the arguments.
    selector: Any = SimpleNamespace(_cached_get_attn_backend=cache(lambda backend, config: "theirs"))
    choose_packed_backend(selector)
    choose_packed_backend(selector)
    result: dict[str, dict[str, list[str]]] = {}
    folders = {"packed": sys.argv[1], "plain": sys.argv[2]}
    for i, kind in enumerate(("plain", "packed", "plain")):
        config = VllmConfig(model_config=ModelConfig(folders[kind], tokenizer=folders[kind]))
        with set_current_vllm_config(config):
            chosen = [
                outcome(lambda b=b: selector._cached_get_attn_backend(b, "config"))
                for b in (None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.FLASH_ATTN)
            ]
            # Two layers, as vLLM itself builds them: with the backend that it chose, and with another one.
            built = [
                outcome(lambda b=b, n=n: Attention(4, 32, 1.0, 2, prefix=f"{n}.attn", attn_backend=b).impl.__class__)
                for n, b in enumerate((None, CPUAttentionBackend))
            ]
        result[f"{i} {kind}"] = {"chosen": chosen, "built": built}
    with open(sys.argv[3], "w") as f:
        json.dump(result, f)


def outcome(call: Callable[[], Any]) -> str:
    try:
        value = call()
    except ValueError as e:
        return str(e)
    return getattr(value, "__name__", value)


if __name__ == "__main__":
    main()
