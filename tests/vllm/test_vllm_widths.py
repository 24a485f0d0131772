"""vLLM serves models whose blocks differ in width: log-probabilities are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from server import needs_vllm
from test_vllm import our_logprobs, serve, some_tokens

import laconic
from tiny import make_model
from vllm_kernels import FOUR_BITS

pytestmark = needs_vllm

# What a head may be wide is up to vLLM's kernels for attention.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def narrowed(tmp_path: Path, arch: str, *more: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny model, and the same with random heads and channels of its middle blocks gone."""
    # vLLM tells the width of a head of Qwen2 by how many there are.
    whole_heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if arch == "qwen2" else {}
    model = make_model(tmp_path / "model", arch, tied=arch.startswith("gemma"), **{**SIZES, **whole_heads})
    stage = {"method": "llm_pruner", "sparsity": 0.4, "importance": "random", "keep_first": 1, "keep_last": 0}
    stage |= {"groups": "mlp"} if whole_heads else {}
    folder = laconic.compress(str(model), {"stages": [stage, *more]}, tmp_path / "artifact").path
    widths = laconic.Artifact(folder).config["laconic_widths"]
    assert whole_heads or len({w.get("num_key_value_heads") for w in widths}) > 1
    assert len({w.get("intermediate_size") for w in widths}) > 1
    return model, folder


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_blocks_of_several_widths_serve_with_our_log_probabilities(tmp_path: Path, arch: str) -> None:
    _, folder = narrowed(tmp_path, arch)
    served = serve(folder, some_tokens(48, 3), "float32")
    ours = laconic.load(folder, dtype=torch.float32)
    for ids, logprobs in zip(served.prompts, served.logprobs, strict=True):
        assert (our_logprobs(ours, ids) - logprobs).abs().max() < 2e-3


@FOUR_BITS
def test_they_serve_when_quantized_afterwards(tmp_path: Path) -> None:
    model, folder = narrowed(tmp_path, "llama", {"method": "rtn", "scheme": "W4A16", "group_size": 16})
    served = serve(folder, some_tokens(48, 3), "bfloat16")
    ours, original = (laconic.load(m, dtype=torch.bfloat16) for m in (folder, model))
    near, far = (
        torch.stack([(our_logprobs(m, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)])
        for m in (ours, original)
    )
    assert near.mean() < 0.05
    assert near.mean() < far.mean() / 4
