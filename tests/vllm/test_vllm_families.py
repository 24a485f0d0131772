"""vLLM serves families that `tiny` does not make, random and small: log-probabilities are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from server import needs_vllm
from test_vllm import our_logprobs, serve, some_tokens

import laconic
from shrunk import make_shrunk
from vllm_kernels import FOUR_BITS

pytestmark = [*needs_vllm, FOUR_BITS]

# Heads, and inputs of linears, as wide as vLLM's CPU kernels take them.
HEADS: dict[str, Any] = {"head_dim": 32}
WIDE: dict[str, Any] = {"hidden_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": HEADS,
    "exaone4": HEADS,
    "gemma4_text": HEADS,
    "glm4": HEADS,
    "gpt_oss": HEADS,
    "granite": WIDE,
    "ministral3": HEADS,
    "nemotron": HEADS,
    "olmo3": WIDE,
    "qwen3_next": HEADS | WIDE | {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "smollm3": HEADS,
    "starcoder2": WIDE,
}
# Experts need AMX tiles, and linear attention mixes widths that no 4-bit kernel takes.
IGNORE = ["lm_head", "re:.*experts.*", "re:.*linear_attn.*"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_of_today_serve_with_our_log_probabilities(tmp_path: Path, model_type: str) -> None:
    model = make_shrunk(tmp_path / "model", model_type, **FAMILIES[model_type])
    stage = {"method": "rtn", "scheme": "W4A16", "group_size": 32, "ignore": IGNORE}
    folder = laconic.compress(str(model), {"stages": [stage]}, tmp_path / "artifact").path
    served = serve(folder, some_tokens(40, 2), "bfloat16", max_model_len=128)
    near, far = (
        torch.stack([(our_logprobs(m, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)])
        for m in (laconic.load(f, dtype=torch.bfloat16) for f in (folder, model))
    )
    assert near.mean() < 0.05
    assert near.mean() < far.mean() / 2
