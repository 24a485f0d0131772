"""Calls: what was recorded without running a block makes the blocks compute alone what they compute in their model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from every_model import WORKS, check
from laconic.checkpoint.source import build_skeleton
from laconic.structure.anatomy import dissect
from shrunk import build, shrunk_config

# Later blocks read keys and values of earlier ones.
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Positions as biases of each sample and head; a mask for each sample; embeddings that each block reads; what a block
# returns beside hidden states.
KINDS = ("bloom", "xglm", "gemma4_text", "bamba")


@pytest.mark.parametrize("model_type", KINDS)
def test_blocks_alone_compute_what_the_model_computes(model_type: str, text: Path, tmp_path: Path) -> None:
    assert check(model_type, tmp_path, text, ("stream",)).results == {"stream": (WORKS, "")}


@pytest.mark.parametrize(
    ("model_type", "linear"),
    [
        ("falcon_mamba", "backbone.layers.0.mixer.dt_proj"),
        ("bart", "model.decoder.layers.0.encoder_attn.q_proj"),
        ("deepseek_v32", "model.layers.0.self_attn.indexer.weights_proj"),
    ],
    ids=["read", "never-called", "dtype-read"],
)
def test_linears_that_cannot_hold_codes_are_known(model_type: str, linear: str) -> None:
    config = shrunk_config(model_type)
    model = build_skeleton(config, build(config).dtype)
    anatomy = dissect(model)
    assert linear in anatomy.bare
    assert not any(linear.endswith(f".{n}") for taps in anatomy.taps for tap in taps for n in tap.linears)


@pytest.mark.parametrize(
    ("model_type", "keys", "obstacle"),
    [
        ("glm_moe_dsa", {}, "pass more than hidden states"),
        ("gemma4_text", SHARING, "pass more than hidden states"),
        ("gemma3n_text", {}, "take more than one hidden state"),
        ("dory", {}, "are called more than once"),
        ("prophetnet", {}, "do not get what the block before them computes"),
    ],
    ids=["indices", "shared-keys", "streams", "loop", "two-inputs"],
)
def test_what_blocks_need_beside_hidden_states_is_an_obstacle(
    model_type: str, keys: dict[str, Any], obstacle: str
) -> None:
    config = shrunk_config(model_type, **keys)
    assert obstacle in str(dissect(build_skeleton(config, build(config).dtype)).obstacle)
