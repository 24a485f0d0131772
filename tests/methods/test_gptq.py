"""GPTQ: its options do what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import original, press, windows
from laconic.evaluation.fidelity import measure
from laconic.methods.gptq import Gptq, retarget
from linears import correlated, made_of, moments_of, output_error, task_of, weight

W, X = weight(), correlated()


def gptq(**keys: Any) -> Gptq:
    return Gptq.model_validate({"scheme": "W4A16", "group_size": 32} | keys)


def error(**keys: Any) -> float:
    return output_error(W, made_of(gptq(**keys), W, X), X)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "W2A16"])
def test_rounding_loud_columns_first_helps(scheme: str) -> None:
    loud = X * torch.linspace(0.1, 2, X.shape[1])
    first, last = (
        output_error(W, made_of(gptq(scheme=scheme, actorder=order, observer="minmax"), W, loud), loud)
        for order in ("weight", None)
    )
    assert first < last


@pytest.mark.parametrize("actorder", ["weight", None])
def test_searched_ranges_help_at_few_bits(actorder: str | None) -> None:
    assert error(scheme="W2A16", actorder=actorder) < error(scheme="W2A16", actorder=actorder, observer="minmax")


@pytest.mark.parametrize("actorder", ["weight", None])
def test_the_size_of_a_block_changes_nothing_but_rounding_noise(actorder: str | None) -> None:
    assert error(block_size=32, actorder=actorder) == pytest.approx(error(block_size=128, actorder=actorder), rel=0.02)


@pytest.mark.parametrize(
    "keys",
    [
        {"scheme": "FP8_BLOCK", "group_size": None},
        {"scheme": "FP8", "group_size": None},
        {"scheme": "FP8", "group_size": None, "strategy": "channel"},
        {"scheme": "W8A8", "group_size": None, "strategy": "tensor"},
        {"scheme": "W4A16", "group_size": -1},
        {"scheme": "W4A16_ASYM", "actorder": None},
        *({"scheme": s, "group_size": None, "actorder": a} for s in ("NVFP4A16", "MXFP4") for a in ("weight", None)),
    ],
    ids=str,
)
def test_every_way_to_share_scales_is_swept(keys: dict[str, Any]) -> None:
    rounded = made_of(gptq(**keys), W, X)
    assert rounded.shape == W.shape
    assert float((rounded - W).norm() / W.norm()) < 0.3


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = X.clone()
    x[:, [3, 64, 127]] = 0
    outcome = gptq().compress(task_of(gptq(), W, moments_of(x), torch.bfloat16))
    assert outcome.notes["dead_columns"] == 3
    assert outcome.weight.decode().isfinite().all()
    assert output_error(W, outcome.weight.decode(), x) < 1.2 * error()


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_inputs_are_enough_to_go_on(tokens: int) -> None:
    few = X[:tokens]
    Q = made_of(gptq(), W, few)
    assert Q.isfinite().all()
    assert output_error(W, Q, few) < 1e-2 * output_error(W, torch.zeros_like(W), few)


def drifted(seed: int = 5) -> torch.Tensor:
    """What the original model reads where the compressed one reads X."""
    return X + 0.1 * correlated(seed=seed)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "W8A8"])
def test_gptaq_comes_closer_to_the_original_output(scheme: str) -> None:
    full = drifted()
    plain, half, whole = (
        output_error(W, made_of(gptq(scheme=scheme, group_size=None, asymmetric_calibration=a), W, X, full), X, full)
        for a in (0.0, 0.5, 1.0)
    )
    assert whole < half < plain


def test_its_target_is_the_least_squares_solution() -> None:
    full, n = drifted(), len(X)
    H, D = X.T @ X / n, (full - X).T @ X / n
    ridge = 0.01 * H.diagonal().mean().double() * torch.eye(X.shape[1], dtype=torch.float64)
    # W + (W D)(H + ridge)^-1, by the normal equations in float64.
    expected = W.double() + torch.linalg.solve(H.double() + ridge, (W.double() @ D.double()).T).T
    torch.testing.assert_close(retarget(W, D, H, 0.01).double(), expected, rtol=1e-3, atol=1e-4)


def test_without_drift_gptaq_is_gptq() -> None:
    assert torch.equal(made_of(gptq(asymmetric_calibration=1.0), W, X, X), made_of(gptq(), W, X))


@pytest.mark.parametrize(
    "keys", [{}, {"actorder": None}, {"true_sequential": False}, {"asymmetric_calibration": 0.5}], ids=str
)
def test_a_model_stays_closer_to_itself_than_by_rounding(
    keys: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    ids, scheme = windows(llama, text), {"scheme": "W3A16", "group_size": 32}
    made = [
        press(llama, tmp_path / method, {"method": method} | scheme | given, text=text)
        for method, given in (("gptq", keys), ("rtn", {"observer": "mse"}))
    ]
    looking, blind = (measure(laconic.load(a.path), ids, original(llama)).kl_mean for a in made)
    assert looking < 0.8 * blind
