"""AWQ, SmoothQuant, AutoRound, ZeroQuant: they do what their papers say, and what they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import laconic
from artifacts import Stage, inputs, linear_events, logits, original, press, tensors, windows
from laconic.evaluation.fidelity import measure
from laconic.formats import LowRank, Outliers, quantize, schemes
from laconic.formats.int_affine import IntAffine
from laconic.formats.tiling import Tiling
from laconic.methods.autoround import _Tuned
from laconic.methods.awq import _InputMeans, _relative_size, _round_scaled
from laconic.methods.smoothquant import scales
from laconic.runtime.linear import QLinear
from laconic.train.block_tuning import differentiable_codes
from tiny import make_model

G16 = Tiling("group", 16)


def kl(folder: Path, artifact: Path, text: Path) -> float:
    return measure(laconic.load(artifact), windows(folder, text), original(folder)).kl_mean


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few loud channels behind every norm, as large models have."""
    folder = make_model(tmp_path_factory.mktemp("models") / "loud")
    model = original(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                channels = torch.randperm(norm.weight.shape[0], generator=generator)[:3]
                norm.weight[channels] *= 32
                for linear in readers:
                    linear.weight[:, channels] /= 32
    model.save_pretrained(folder)
    return folder


# SmoothQuant ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_scales_are_equation_four(alpha: float) -> None:
    X, W = torch.randn(40, 8), torch.randn(6, 8)
    found = scales(X.abs().amax(0), W, alpha)
    for j in range(8):
        x, w = max(abs(v) for v in X[:, j].tolist()), max(abs(v) for v in W[:, j].tolist())
        assert float(found[j]) == pytest.approx(x**alpha / w ** (1 - alpha), rel=1e-5)


def test_a_dead_channel_is_not_scaled() -> None:
    W = torch.randn(6, 3)
    W[:, 1] = 0
    assert scales(torch.tensor([0.0, 2.0, 2.0]), W, 0.5)[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothing_alone_changes_weights_but_not_the_model(alpha: Any, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.float32)
    artifact = press(folder, tmp_path / "smooth", {"method": "smoothquant", "alpha": alpha}, text=text)
    before, after = tensors(folder), tensors(artifact.path)
    changed = {n.split(".", 3)[3] for n in before if "layers" in n and not torch.equal(before[n], after[n])}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert changed == norms | {f"self_attn.{n}_proj.weight" for n in "qkv"} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up")
    }
    expected, found = logits(original(folder)), logits(laconic.load(artifact.path))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothing_helps_where_there_are_outliers(
    alpha: Any, dynamic: bool, loud: Path, text: Path, tmp_path: Path
) -> None:
    rtn: Stage = {"method": "rtn", "scheme": "W8A8", "dynamic": dynamic}
    naive = press(loud, tmp_path / "naive", rtn, text=text)
    smooth = press(loud, tmp_path / "smooth", {"method": "smoothquant", "alpha": alpha}, rtn, text=text)
    assert kl(loud, smooth.path, text) < 0.5 * kl(loud, naive.path, text)


def test_static_scales_are_those_of_the_smoothed_model(loud: Path, text: Path, tmp_path: Path) -> None:
    stages: list[Stage] = [{"method": "smoothquant"}, {"method": "rtn", "scheme": "W8A8", "dynamic": False}]
    smooth = laconic.load(press(loud, tmp_path / "smooth", stages[0], text=text).path)
    both = laconic.load(press(loud, tmp_path / "both", *stages, text=text).path)
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    for name, seen in inputs(smooth, windows(loud, text), names).items():
        found = float(both.get_submodule(name).input_scale)
        assert found == pytest.approx(float(seen.abs().max()) / 127, rel=0.1)


# AWQ ------------------------------------------------------------------------------------------------------------------


def test_a_column_is_measured_against_its_group() -> None:
    W = torch.randn(5, 32)
    found = _relative_size(W, 16)
    for j in range(32):
        group = W[:, j // 16 * 16 : j // 16 * 16 + 16].abs().amax(1)
        assert float(found[j]) == pytest.approx(float((W[:, j].abs() / group).mean()), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scaled_and_rounded_weight_has_its_scale_taken_back(symmetric: bool) -> None:
    fmt, W, s = IntAffine(4, symmetric, G16), torch.randn(70, 64), torch.rand(64) + 0.5
    expected = quantize(fmt, W * s, fmt.fit(W * s)).decode() / s
    torch.testing.assert_close(_round_scaled(W, s, fmt), expected)


def test_what_was_seen_of_x_tells_of_scaled_x() -> None:
    X, s = torch.randn(50, 32, dtype=torch.float64), torch.rand(32, dtype=torch.float64) + 0.5

    def seen(X: Tensor) -> _InputMeans:
        blocks = torch.stack([x.T @ x for x in X.split(16, 1)]) / len(X)
        return _InputMeans(X.abs().mean(0), X.square().mean(0), blocks)

    moved, expected = seen(X).divided(s), seen(X / s)
    for name in ("mean", "energy", "blocks"):
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name))


@pytest.mark.parametrize("clip", [True, False])
def test_scaling_helps_where_some_activations_are_loud(clip: bool, loud: Path, text: Path, tmp_path: Path) -> None:
    keys: Stage = {"scheme": "W3A16", "group_size": 32, "symmetric": False}
    awq = press(loud, tmp_path / "awq", keys | {"method": "awq", "clip": clip}, text=text)
    rtn = press(loud, tmp_path / "rtn", keys | {"method": "rtn"}, text=text)
    assert kl(loud, awq.path, text) < 0.7 * kl(loud, rtn.path, text)
    assert any(event["ratio"] > 0 for event in linear_events(awq))


def test_awq_changes_no_untargeted_function(text: Path, tmp_path: Path) -> None:
    # Only the down projection is rounded, so what is scaled for it must come out even in the rest.
    folder = make_model(tmp_path / "model", dtype=torch.float32)
    stage: Stage = {"method": "awq", "scheme": "W8A16", "targets": "re:.*down_proj"}
    artifact = press(folder, tmp_path / "awq", stage, text=text)
    expected, found = logits(original(folder)), logits(laconic.load(artifact.path))
    assert float((found - expected).norm() / expected.norm()) < 0.02


# AutoRound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_its_gradient_is_that_of_the_straight_through_estimator(num_bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    fmt, W, G = IntAffine(num_bits, symmetric, G16), torch.randn(8, 64), torch.randn(8, 64)
    tuned = _Tuned.start(fmt, W)
    tuned.low.data.uniform_(0.5, 1)
    tuned.high.data.uniform_(0.5, 1)
    tuned.V.data.uniform_(-0.5, 0.5)
    (tuned.weight(fmt, torch.float32) * G).sum().backward()

    V, low, high = (t.detach().clone().requires_grad_() for t in (tuned.V, tuned.low, tuned.high))
    lo, hi = tuned.lo * low, tuned.hi * high
    # A symmetric grid's lowest code is the end that reaches further.
    end = torch.where(hi > -lo, hi, lo) / fmt.qmin
    s = (end if symmetric else (hi.clamp(min=0) - lo.clamp(max=0)) / (fmt.qmax - fmt.qmin))[..., None]
    zero = torch.zeros_like(s) if symmetric else (fmt.qmin - lo.clamp(max=0)[..., None] / s).round().detach()
    u = W.view(8, -1, 16) / s + V
    rounded = u + (u.round() - u).detach()
    Q = ((rounded + zero).clamp(fmt.qmin, fmt.qmax) - zero) * s
    torch.testing.assert_close(tuned.weight(fmt, torch.float32), Q.reshape(8, 64))
    (Q.reshape(8, 64) * G).sum().backward()
    for found, expected in ((tuned.V, V), (tuned.low, low), (tuned.high, high)):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_what_was_tuned_is_what_is_stored() -> None:
    torch.manual_seed(0)
    fmt = IntAffine(3, False, G16)
    tuned = _Tuned.start(fmt, torch.randn(8, 64))
    tuned.V.data.uniform_(-0.5, 0.5)
    tuned.high.data.uniform_(0.5, 1)
    made = tuned.weight(fmt, torch.bfloat16).detach()
    torch.testing.assert_close(tuned.quantized(fmt, torch.bfloat16).decode(torch.bfloat16), made)


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "autoround", "scheme": "W2A16", "group_size": 32, "iters": 20, "batch_size": 4},
        {
            "method": "autoround",
            "scheme": "W2A16",
            "group_size": 32,
            "iters": 20,
            "batch_size": 4,
            "asymmetric_calibration": False,
        },
        {"method": "zeroquant", "scheme": "W4A8", "group_size": 32, "iters": 20, "batch_size": 4},
    ],
    ids=str,
)
def test_tuning_lowers_the_error_of_every_block_and_of_the_model(
    stage: Stage, llama: Path, text: Path, tmp_path: Path
) -> None:
    tuned = press(llama, tmp_path / "tuned", stage, text=text)
    assert all(event["loss_after"] < event["loss_before"] for event in linear_events(tuned))
    plain = {"method": "rtn"} | {k: stage[k] for k in ("scheme", "group_size")}
    rtn = press(llama, tmp_path / "rtn", plain, text=text)
    assert kl(llama, tuned.path, text) < kl(llama, rtn.path, text)


@pytest.mark.parametrize("scheme", ["W8A8", "W6A6", "FP8_DYNAMIC"])
@pytest.mark.parametrize("method", ["autoround", "zeroquant"])
def test_tuning_sees_through_what_an_earlier_stage_rounded(
    method: str, scheme: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    # What gate and up put out goes through down, and through nothing else.
    before: Stage = {"method": "rtn", "scheme": scheme, "targets": "re:.*down_proj"}
    stage: Stage = {
        "method": method,
        "scheme": "W4A16",
        "group_size": 32,
        "iters": 20,
        "targets": "re:.*(gate|up)_proj",
    }
    artifact = press(llama, tmp_path / "tuned", before, stage, text=text)
    tuned = [event for event in linear_events(artifact) if event["method"] == method]
    assert all(event["loss_after"] < event["loss_before"] for event in tuned)


@pytest.mark.parametrize("keys", [{}, {"outlier_columns": 3}, {"rank": 2}], ids=str)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_codes_pass_on_the_gradient_of_what_they_stand_for(scheme: str, keys: dict[str, int]) -> None:
    torch.manual_seed(0)
    kept = replace(schemes.scheme(scheme, group_size=16 if scheme == "W4A8" else None), **keys)
    linear = QLinear(32, 8, bias=False, scheme=kept, dtype=torch.float32)
    W = torch.randn(8, 32)
    made = quantize(kept.weights, W, kept.weights.fit(W, torch.float32))
    if "outlier_columns" in keys:
        made = replace(made, outliers=Outliers(torch.tensor([1, 5, 9], dtype=torch.int32), torch.randn(8, 3)))
    if "rank" in keys:
        made = replace(made, low_rank=LowRank(torch.randn(8, 2), torch.randn(2, 32)))
    for name, tensor in made.to_tensors().items():
        setattr(linear, name, torch.nn.Parameter(tensor, requires_grad=False))
    x, G = torch.randn(2, 5, 32).requires_grad_(), torch.randn(2, 5, 8)
    expected = linear(x.detach())
    with differentiable_codes(linear, torch.float32):
        found = linear(x)
    assert torch.equal(found, expected)
    (found * G).sum().backward()
    torch.testing.assert_close(x.grad, G @ linear.decode(torch.float32))
    assert torch.equal(linear(x), expected)


# What they refuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best"])
def test_alpha_is_between_zero_and_one(alpha: Any, llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.0\.alpha"):
        press(llama, tmp_path / "x", {"method": "smoothquant", "alpha": alpha}, text=text)


def test_groups_under_which_alphas_are_compared_divide_the_inputs(llama: Path, text: Path, tmp_path: Path) -> None:
    stage: Stage = {"method": "smoothquant", "alpha": "search", "scheme": "W4A8"}
    said = r"group_size 128, which does not divide the 64 inputs of self_attn\.q_proj; set group_size to 64, 32, -1"
    with pytest.raises(ValueError, match=said):
        press(llama, tmp_path / "refused", stage, text=text)
    assert not list(tmp_path.iterdir())
    artifact = press(llama, tmp_path / "grouped", stage | {"group_size": 32}, text=text)
    assert all(0 <= event["alpha"] <= 1 for event in linear_events(artifact))
    press(llama, tmp_path / "given", stage | {"alpha": 0.5}, text=text)
    with pytest.raises(ValueError, match="W8A8 has no groups"):
        press(llama, tmp_path / "x", stage | {"scheme": "W8A8", "group_size": 32}, text=text)


@pytest.mark.parametrize("method", ["awq", "autoround", "zeroquant", "smoothquant"])
def test_calibration_is_needed(method: str, llama: Path, tmp_path: Path) -> None:
    stage: Stage = {"method": method} | ({} if method == "smoothquant" else {"scheme": "W8A16"})
    with pytest.raises(ValueError, match=f"{method} needs calibration text"):
        press(llama, tmp_path / "x", stage)
    assert not list(tmp_path.iterdir())


def test_a_block_method_cannot_treat_the_head(llama: Path, text: Path, tmp_path: Path) -> None:
    stage: Stage = {"method": "awq", "scheme": "W8A16", "targets": ["Linear", "lm_head"], "ignore": []}
    with pytest.raises(ValueError, match="works on decoder blocks, and lm_head is in none"):
        press(llama, tmp_path / "x", stage, text=text)
