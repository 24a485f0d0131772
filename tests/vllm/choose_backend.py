"""Runs in vLLM's own environment: what a platform that chooses among backends chooses, once our plugin is there.

usage: python choose_backend.py MODEL_WITH_A_PACKED_CACHE MODEL_WITHOUT OUT.json
"""

import json
import sys
from types import SimpleNamespace


def main() -> None:
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from laconic.serving.vllm_kv import choose_packed_backend

    platform = SimpleNamespace(get_attn_backend_cls=lambda selected, config, heads: "theirs")
    choose_packed_backend(platform)
    choose_packed_backend(platform)
    found = []
    for folder in sys.argv[1:3]:
        with set_current_vllm_config(VllmConfig(model_config=ModelConfig(folder, tokenizer=folder))):
            for selected in (None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.FLASH_ATTN):
                found.append(platform.get_attn_backend_cls(selected, None))
    with open(sys.argv[3], "w") as f:
        json.dump(found, f)


if __name__ == "__main__":
    main()
