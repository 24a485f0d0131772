"""A weight that is zero when a quantizing stage gets it stays zero, to the last bit, under every method and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laconic
from artifacts import press, quantized_linears, recipe, tensors
from laconic.methods.gptq import Gptq
from laconic.methods.llm_int8 import LlmInt8
from laconic.methods.rtn import Rtn
from laconic.methods.sparsegpt import SparseGpt
from laconic.stages.linear import LinearStage, Outcome
from linears import correlated, made_of, output_error, weight

SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "W4A16_ASYM", "group_size": 32},
    {"scheme": "W2A16", "group_size": 16, "symmetric": False},
    {"scheme": "W3A16", "group_size": -1},
    {"scheme": "W8A8"},
    {"scheme": "W8A8", "strategy": "tensor"},
    {"scheme": "FP8"},
    {"scheme": "FP8_BLOCK"},
    {"scheme": "NVFP4A16"},
    {"scheme": "MXFP4A16"},
]
METHODS: list[tuple[type[LinearStage], dict[str, Any]]] = [
    (Rtn, {}),
    (Rtn, {"observer": "mse"}),
    (Gptq, {}),
    (Gptq, {"actorder": None}),
    (Gptq, {"asymmetric_calibration": 1.0}),
    (Gptq, {"outlier_ratio": 0.05}),
    (Gptq, {"outlier_ratio": 0.05, "asymmetric_calibration": 0.5}),
]
STAGES = [m.model_validate(scheme | keys) for m, keys in METHODS for scheme in SCHEMES] + [
    LlmInt8(threshold=2.0),
    LlmInt8(outlier_ratio=0.05),
]
X, FULL = correlated(256), correlated(256) + 0.1 * correlated(256, seed=5)


@settings(max_examples=100)
@given(st.sampled_from(STAGES), st.integers(0, 999), st.floats(0, 1))
def test_zeros_stay_zeros(stage: LinearStage, seed: int, share: float) -> None:
    W = weight(32)
    W[torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) < share] = 0
    made = made_of(stage, W, X, FULL if stage.needs.cross_moments else None)
    assert (made[W == 0] == 0).all()
    assert made.isfinite().all()


@pytest.mark.parametrize("keys", [{}, {"actorder": None}, {"asymmetric_calibration": 1.0}], ids=str)
def test_what_is_kept_answers_for_what_is_rounded(keys: dict[str, Any]) -> None:
    """The column loop is worth as much on a masked weight as it is on a dense one."""
    x, full = correlated(), correlated() + 0.1 * correlated(seed=5) if keys.get("asymmetric_calibration") else None
    W = made_of(SparseGpt(), weight(), correlated())
    scheme = {"scheme": "W3A16", "group_size": 32}
    swept = output_error(W, made_of(Gptq.model_validate(scheme | keys), W, x, full), x, full)
    assert swept < 0.9 * output_error(W, made_of(Rtn.model_validate(scheme | {"observer": "mse"}), W, x), x, full)


QUANTIZING: list[list[dict[str, Any]]] = [
    [{"method": "rtn", "scheme": "W4A16_ASYM", "group_size": 32}],
    [{"method": "awq", "scheme": "W4A16", "group_size": 32, "unlinked": "skip"}],
    [{"method": "awq", "scheme": "W4A16_ASYM", "group_size": 32, "unlinked": "skip", "outlier_ratio": 0.05}],
    [{"method": "autoround", "scheme": "W2A16", "group_size": 16, "iters": 4, "batch_size": 2, "lr": 0.3}],
    [{"method": "autoround", "scheme": "FP8_DYNAMIC", "iters": 4, "batch_size": 2, "lr": 0.3}],
    [{"method": "autoround", "scheme": "W2A16", "group_size": 16, "symmetric": False, "iters": 4, "lr": 0.3}],
    [{"method": "zeroquant", "scheme": "W4A8", "group_size": 32, "iters": 4, "batch_size": 2}],
    [{"method": "smoothquant", "alpha": 0.5}, {"method": "rtn", "scheme": "W8A8"}],
    [{"method": "gptq", "scheme": "W4A16", "group_size": 32, "asymmetric_calibration": 1.0}],
]


def id_of(stages: list[dict[str, Any]]) -> str:
    return "-".join(str(v) for stage in stages for v in stage.values())


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return press(llama, tmp_path_factory.mktemp("pruned") / "out", {"method": "magnitude", "sparsity": 0.5}).path


@pytest.mark.parametrize("stages", QUANTIZING, ids=id_of)
def test_a_pruned_checkpoint_keeps_its_zeros(
    stages: list[dict[str, Any]], pruned: Path, text: Path, tmp_path: Path
) -> None:
    before = tensors(pruned)
    made = quantized_linears(laconic.load(press(pruned, tmp_path / "out", *stages, text=text).path))
    assert made
    for name, linear in made.items():
        gone = before[f"{name}.weight"] == 0
        assert float(gone.float().mean()) > 0.1
        assert (linear.decode(torch.float32)[gone] == 0).all()


@pytest.mark.parametrize("stages", QUANTIZING, ids=id_of)
def test_stages_of_one_recipe_keep_them_too(
    stages: list[dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    pruning = {"method": "sparsegpt", "mask_structure": "2:4"}
    made = quantized_linears(laconic.load(press(llama, tmp_path / "out", pruning, *stages, text=text).path))
    for linear in made.values():
        assert ((linear.decode(torch.float32) != 0).view(linear.out_features, -1, 4).sum(-1) <= 2).all()


def test_a_mask_that_a_later_stage_loses_ends_the_run(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseGpt, "compress", lambda self, task: Outcome(task.weight + 1))
    stages = [{"method": "magnitude"}, {"method": "sparsegpt", "targets": "re:.*down_proj"}]
    with pytest.raises(ValueError, match="down_proj: sparsegpt has filled in 4096 of the zeros of magnitude; list"):
        laconic.compress(str(llama), recipe(*stages, text=text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.5, "actorder": None},
        {"mask_structure": "2:4"},
        {"mask_structure": "2:4", "actorder": None},
        {"mask_structure": "4x8", "sparsity": 0.25},
        {"mask_structure": "2:4", "asymmetric_calibration": 1.0},
        {"mask_structure": "4:8", "scheme": "FP8_DYNAMIC", "group_size": None},
        {"mask_structure": "4:8", "scheme": "NVFP4A16", "group_size": None},
        {"sparsity": 0.5, "scheme": "W4A16_ASYM"},
    ],
    ids=str,
)
def test_gptq_prunes_and_rounds_in_one_loop(keys: dict[str, Any]) -> None:
    W, x = weight(), correlated()
    stage = Gptq.model_validate({"scheme": "W4A16", "group_size": 32} | keys)
    made = made_of(stage, W, x, x if stage.needs.cross_moments else None)
    share = float((made == 0).float().mean())
    # Some of what is kept rounds to zero as well.
    assert stage.share <= share < stage.share + 0.15
    if stage.structure.group:
        kept, of = stage.structure.group
        assert ((made != 0).view(len(W), -1, of).sum(-1) <= kept).all()
    # Closer than round-to-nearest on the weights that Wanda would keep.
    from laconic.methods.wanda import Wanda

    mask = Wanda.model_validate({"sparsity": keys.get("sparsity"), "mask_structure": stage.mask_structure})
    blind = Rtn.model_validate({"scheme": stage.scheme, "group_size": stage.group_size, "observer": "mse"})
    assert output_error(W, made, x) < 0.8 * output_error(W, made_of(blind, made_of(mask, W, x), x), x)


def test_one_loop_is_no_worse_than_two() -> None:
    W, x = weight(), correlated()
    scheme = {"scheme": "W3A16", "group_size": 32}
    for structure in ("unstructured", "2:4"):
        share = {"sparsity": 0.5, "mask_structure": structure}
        jointly = made_of(Gptq.model_validate(scheme | share), W, x)
        apart = made_of(Gptq.model_validate(scheme), made_of(SparseGpt.model_validate(share), W, x), x)
        assert output_error(W, jointly, x) < output_error(W, apart, x)
