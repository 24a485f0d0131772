"""vLLM serves what stages of the whole model leave: fewer blocks, experts or hidden channels; adapters kept beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from server import needs_vllm
from test_vllm import DEMO, SOURCE, our_logprobs, serve, some_tokens

import laconic
from tiny import make_model
from vllm_kernels import FOUR_BITS

pytestmark = needs_vllm

# What a head may be wide is up to vLLM's kernels for attention.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer blocks": ("llama", {"method": "depth", "blocks": 1}),
    "fewer blocks of two kinds": ("gemma2", {"method": "depth", "blocks": 1}),
    "fewer experts": ("mixtral", {"method": "reap"}),
    "fewer small experts": ("qwen3_moe", {"method": "reap"}),
    "fewer hidden channels": ("llama", {"method": "llm_pruner", "groups": "hidden", "sparsity": 0.25}),
}


def calibration(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(SOURCE * 40)
    return {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 64}


@pytest.mark.parametrize(("arch", "stage"), STAGES.values(), ids=STAGES)
def test_smaller_models_serve_with_our_log_probabilities(tmp_path: Path, arch: str, stage: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model", arch, tied=arch.startswith("gemma"), **SIZES)
    asked = {"stages": [stage], "calibration": calibration(tmp_path)}
    folder = laconic.compress(str(model), asked, tmp_path / "artifact").path
    served = serve(folder, some_tokens(48, 3), "float32")
    ours = laconic.load(folder, dtype=torch.float32)
    for ids, logprobs in zip(served.prompts, served.logprobs, strict=True):
        assert (our_logprobs(ours, ids) - logprobs).abs().max() < 2e-3


@pytest.mark.parametrize("scheme", [None, pytest.param("W4A16", marks=FOUR_BITS)])
def test_an_adapter_kept_beside_its_base_is_served_with_it(tmp_path: Path, scheme: str | None) -> None:
    kept = calibration(tmp_path)
    stages: list[dict[str, Any]] = [{"method": "rtn", "scheme": scheme}] if scheme else []
    training = {"rank": 8, "learning_rate": 5e-3, "max_steps": 4, "batch_size": 4, "max_seq_length": 64}
    stages.append({"method": "lora", "keep_adapters": True, "data": [{"dataset": kept["dataset"]}], **training})
    folder = laconic.compress(str(DEMO), {"stages": stages}, tmp_path / "artifact").path
    # The kernel of 4-bit weights computes in half precision.
    served = serve(folder, some_tokens(48, 3), "bfloat16" if scheme else "float32", adapter=folder / "adapter")
    ours, bare = (laconic.load(folder, dtype=torch.float32, adapter=adapter) for adapter in (True, False))
    near = far = 0.0
    for ids, written, logprobs in zip(served.prompts, served.tokens, served.logprobs, strict=True):
        near += float((our_logprobs(ours, ids + written)[-len(written) :] - logprobs).abs().mean())
        far += float((our_logprobs(bare, ids + written)[-len(written) :] - logprobs).abs().mean())
    assert near < far / (4 if scheme else 10)
