"""Outlier columns answer for the errors of the others, and a low-rank product for what is left: both at their best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laconic.formats import Quantized
from laconic.methods.gptq import Gptq
from laconic.methods.rtn import Rtn
from laconic.solvers.moments import Moments
from laconic.stages.quantizing import QuantizingStage
from laconic.walk.side_tensors import low_rank
from linears import compressed

TOKENS, IN = 600, 64
LOUD = [5, 40, 41]


def calibration() -> Tensor:
    """Activations that go together, three inputs of them loud."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator) / IN**0.5
    x[:, LOUD] *= 30
    return x


X = calibration()
W = torch.randn(24, IN, generator=torch.Generator().manual_seed(1))


def moments(*, gram: bool = True, full: Tensor | None = None) -> Moments:
    found = Moments(IN, torch.device("cpu"), gram=gram, cross=full is not None)
    found.add(X, full)
    return found.finish()


def gptq(**keys: Any) -> Gptq:
    return Gptq.model_validate({"scheme": "W3A16", "group_size": 16} | keys)


def rtn(**keys: Any) -> Rtn:
    return Rtn.model_validate({"scheme": "W3A16", "group_size": 16} | keys)


def made(stage: QuantizingStage, seen: Moments, dtype: torch.dtype = torch.float32) -> Quantized:
    (outcome,) = compressed(stage, W, seen, dtype)
    assert isinstance(outcome.weight, Quantized)
    return outcome.weight


def lost(Q: Tensor, full: Tensor | None = None) -> float:
    truth = X if full is None else full
    return float((X.double() @ Q.double().T - truth.double() @ W.double().T).square().sum())


# --- outlier columns ---


@pytest.mark.parametrize(
    "stage",
    [gptq(outlier_ratio=0.05), rtn(outlier_ratio=0.05), rtn(scheme="W6A6", group_size=None, outlier_ratio=0.05)],
    ids=["energy", "peak", "peak of rounded activations"],
)
def test_the_loudest_columns_are_kept_in_order(stage: QuantizingStage) -> None:
    q = made(stage, moments(gram=stage.needs.second_moments))
    assert q.outliers is not None
    assert q.outliers.indices.tolist() == LOUD
    assert q.outliers.indices.dtype == torch.int32


def test_without_second_moments_they_are_kept_as_they_were() -> None:
    q = made(rtn(outlier_ratio=0.05), moments(gram=False), torch.bfloat16)
    assert torch.equal(q.outliers.weight, W[:, LOUD].bfloat16())


def test_a_loud_weight_in_an_outlier_column_widens_no_grid() -> None:
    spiked = W.clone()
    spiked[:, LOUD] *= 1000
    (plain,), (wide,) = (
        compressed(rtn(outlier_ratio=0.05), w, moments(gram=False), torch.float32) for w in (W, spiked)
    )
    assert torch.equal(wide.weight.params["scale"], plain.weight.params["scale"])


def test_their_weights_are_the_least_squares_answer_to_the_errors_of_the_others() -> None:
    q = made(gptq(outlier_ratio=0.05), moments())
    rest = [i for i in range(IN) if i not in LOUD]
    # min_V || X_R (W_R - Q_R)^T + X_O (W_O - V)^T ||^2 + ridge || W_O - V ||^2, by the normal equations.
    x = X.double().numpy()
    missed = x[:, rest] @ (W - q.decode()).double().numpy()[:, rest].T
    gram = x[:, LOUD].T @ x[:, LOUD]
    ridge = 0.01 * np.diag(gram).mean() * np.eye(len(LOUD))
    expected = W.double().numpy()[:, LOUD] + np.linalg.solve(gram + ridge, x[:, LOUD].T @ missed).T
    np.testing.assert_allclose(q.outliers.weight.double().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_they_do_not_count_as_dead_inputs() -> None:
    (outcome,) = compressed(gptq(outlier_ratio=0.05), W, moments(), torch.float32)
    assert outcome.notes["dead_columns"] == 0
    assert outcome.notes["outlier_columns"] == 3
    assert outcome.notes["outlier_share"] == pytest.approx(3 / IN, abs=1e-4)


def test_they_help_more_than_columns_that_only_stay() -> None:
    free = made(gptq(outlier_ratio=0.05), moments())
    fixed = free.decode()
    fixed[:, LOUD] = W[:, LOUD]
    assert lost(free.decode()) < lost(fixed)
    assert lost(free.decode()) < 0.7 * lost(made(gptq(), moments()).decode())


def test_they_go_with_the_original_models_output() -> None:
    full = X + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(4))
    towards, blind = (
        made(gptq(asymmetric_calibration=a, outlier_ratio=0.05), moments(full=full)).decode() for a in (1.0, 0.0)
    )
    assert lost(towards, full) < lost(blind, full)


# --- the low-rank product ---


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (30, 30)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_it_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    E = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    kept = low_rank(E, rank, None, torch.float64)
    U, S, V = np.linalg.svd(E.double().numpy(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ V[:rank]
    np.testing.assert_allclose((kept.left @ kept.right).numpy(), best, atol=1e-5)
    assert kept.left.shape == (shape[0], rank)
    assert kept.right.shape == (rank, shape[1])


@pytest.mark.parametrize("rows", [24, 96])
def test_with_second_moments_it_is_the_best_for_the_output(rows: int) -> None:
    E = torch.randn(rows, IN, generator=torch.Generator().manual_seed(2))
    kept = low_rank(E, 6, X.T @ X, torch.float64)
    H = X.double().numpy().T @ X.double().numpy()
    H += 0.01 * np.diag(H).mean() * np.eye(IN)
    values, vectors = np.linalg.eigh(H)
    root = (vectors * np.sqrt(values)) @ vectors.T
    singular = np.linalg.svd(E.double().numpy() @ root, compute_uv=False)
    left_over = (E.double() - kept.left @ kept.right).numpy() @ root
    assert np.square(left_over).sum() == pytest.approx(np.square(singular[6:]).sum(), rel=1e-4)


@pytest.mark.parametrize("stage", [rtn, gptq], ids=["rtn", "gptq"])
@pytest.mark.parametrize("outlier_ratio", [None, 0.05])
def test_more_rank_leaves_less(stage: Any, outlier_ratio: float | None) -> None:
    errors = [
        lost(made(s := stage(low_rank=r, outlier_ratio=outlier_ratio), moments(gram=s.needs.second_moments)).decode())
        for r in (0, 4, 12, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_linears_of_a_tap_come_out_as_each_would_alone() -> None:
    stage, rows = gptq(outlier_ratio=0.05, low_rank=3), [8, 16]
    together = compressed(stage, W, moments(), torch.float32, rows)
    for outcome, part in zip(together, W.split(rows), strict=True):
        (alone,) = compressed(stage, part, moments(), torch.float32)
        torch.testing.assert_close(outcome.weight.decode(), alone.weight.decode(), rtol=1e-3, atol=1e-4)
