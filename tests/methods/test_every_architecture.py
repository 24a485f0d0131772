"""Methods on every architecture: the file opens, and the model is near. Of RTN `test_architectures` asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import Stage, logits, press, windows
from laconic.evaluation.fidelity import measure
from tiny import ARCHITECTURES, make_model

METHODS: dict[str, list[Stage]] = {
    "gptq": [{"method": "gptq", "scheme": "W4A16", "group_size": 32}],
    "awq": [{"method": "awq", "scheme": "W4A16_ASYM", "group_size": 32, "unlinked": "skip", "search_tokens": 128}],
    "autoround": [{"method": "autoround", "scheme": "W4A16", "group_size": 32, "iters": 2, "batch_size": 2}],
    "zeroquant": [{"method": "zeroquant", "scheme": "W4A8", "group_size": 32, "iters": 2, "batch_size": 2}],
    "llm_int8": [{"method": "llm_int8", "outlier_ratio": 0.05}],
    "smoothquant": [{"method": "smoothquant"}, {"method": "rtn", "scheme": "W8A8"}],
    "sparsegpt": [{"method": "sparsegpt", "sparsity": 0.25}, {"method": "rtn", "scheme": "W8A16"}],
    "wanda": [{"method": "wanda", "sparsity": 0.25, "update": True, "allocation": "search"}],
}
# Beyond it a compressed model is another model: the largest mean KL seen of these was a tenth of it.
FAR = 1.0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_is_compressed_opened_and_near(arch: str, method: str, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch)
    calibration: dict[str, Any] = {"moe_calibrate_all_experts": True} if "m" in arch[0] or "moe" in arch else {}
    artifact = press(folder, tmp_path / "artifact", *METHODS[method], text=text, **calibration)
    compressed, original = laconic.load(artifact.path), laconic.load(folder)
    assert torch.isfinite(logits(compressed)).all()
    assert measure(compressed, windows(folder, text), original).kl_mean < FAR
