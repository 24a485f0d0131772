"""16-bit side tensors of a quantized linear, the same for every method: outlier columns and a low-rank product.

Outlier columns are not rounded, so they can compensate for the errors of those that are. With E = W - Q over the
rounded columns R, and the columns O free, ||E_R X_R + (W_O - V) X_O||^2 is least at V = W_O + E_R H_RO H_OO^-1, and the
rest of it is tr(E_R S E_R^T), S = H_RR - H_RO H_OO^-1 H_OR. A method therefore rounds R under S, as it rounds any
weight; in GPTQ's own terms, the outlier columns come last and take up the feedback. (Columns in 16 bit: LLM.int8,
arXiv 2208.07339; OWQ, arXiv 2306.02272.)

The low-rank product is that of ZeroQuant-V2 (LoRC, arXiv 2303.08302): the best of rank r for W - Q by singular values.
Where the method uses second moments H, it is the best for (W - Q) X instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laconic.formats import LowRank, Outliers, Quantized
from laconic.formats.rotation import rotate_channels
from laconic.formats.schemes import Scheme
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearStage, LinearTask, Outcome, WeightStage
from laconic.stages.quantizing import QuantizingStage
from laconic.walk.outcomes import check_outcome

# Share of the mean of diag(H_OO) added to it, as GPTQ does with all of H.
_DAMPENING = 0.01
# From this share of zeros on, a weight is taken for pruned.
_PRUNED = 0.1


def compress_stack(stage: LinearStage, task: LinearTask) -> list[Outcome]:
    """Compress stacked linears with their side tensors.

    Args:
        stage: the method.
        task: the linears; its parts say which rows are one linear.

    Returns:
        An outcome for each part.
    """
    if not isinstance(stage, QuantizingStage):
        return _split(_compress(stage, task), task)
    assert task.scheme is not None
    if task.scheme.input_rotation:
        return [_with_rotated_input(o) for o in _compress_quantized(stage, _rotated_task(task))]
    return _compress_quantized(stage, task)


def _compress_quantized(stage: LinearStage, task: LinearTask) -> list[Outcome]:
    assert isinstance(stage, QuantizingStage)
    assert task.scheme is not None
    columns = stage.outlier_columns(task.scheme, task.moments).to(task.weight.device)
    rank = task.scheme.rank
    if not (len(columns) or rank):
        return _split(_compress(stage, task), task)
    # Zeros stay zeros, wherever a target would have moved them.
    target = stage.target(task) * (task.weight != 0)
    outcome = _compress_beside(stage, replace(task, weight=target), columns)
    outcomes = _split(outcome, task)
    if not rank:
        return outcomes
    H = task.moments.H if task.moments is not None else None
    return [
        replace(o, weight=_with_low_rank(o.weight, target[part.rows], rank, H, task.dtype))
        for o, part in zip(outcomes, task.parts, strict=True)
    ]


def attach(
    stage: WeightStage,
    outcome: Outcome,
    *,
    scheme: Scheme | None,
    weight: Tensor,
    rows: Sequence[slice],
    moments: Moments | None,
    dtype: torch.dtype,
) -> list[Outcome]:
    """Add side tensors to the outcome of a block stage: outlier columns as they are, a product for the other errors.

    Args:
        stage: the method.
        outcome: of the stacked linears.
        scheme: of the linears.
        weight: (out, in) float32, the dense weights of the stacked linears.
        rows: of each linear.
        moments: of their input, if the stage needs any.
        dtype: in which side tensors are stored.

    Returns:
        An outcome for each linear.
    """
    compressed = outcome.weight
    if not isinstance(compressed, Quantized) or not isinstance(stage, QuantizingStage):
        return [Outcome(_cut(compressed, part), outcome.notes) for part in rows]
    assert scheme is not None
    columns = stage.outlier_columns(scheme, moments).to(weight.device)
    if len(columns):
        compressed = replace(compressed, outliers=Outliers(columns.to(torch.int32), weight[:, columns].to(dtype)))
    outcomes = []
    for part in rows:
        q = compressed.rows(part.start, part.stop)
        if scheme.rank:
            q = _with_low_rank(q, weight[part], scheme.rank, None, dtype)
        outcomes.append(Outcome(q, outcome.notes))
    return outcomes


def _compress(stage: LinearStage, task: LinearTask) -> Outcome:
    shape = (task.weight.shape[0], task.weight.shape[1])
    return check_outcome(stage, stage.compress(task), task.scheme, shape)


def _rotated_task(task: LinearTask) -> LinearTask:
    """Return linears with rotated input channels: W Q, and moments of Q x."""
    if float((task.weight == 0).float().mean()) > _PRUNED:
        raise ValueError("rotate_inputs would fill in the zeros of a pruned weight; leave it out")
    moments = task.moments
    if moments is not None:
        moments = copy.copy(moments)
        for name in ("H", "D"):
            M = getattr(moments, name)
            setattr(moments, name, None if M is None else rotate_channels(rotate_channels(M).T).T.contiguous())
    return replace(task, weight=rotate_channels(task.weight), moments=moments)


def _with_rotated_input(outcome: Outcome) -> Outcome:
    assert isinstance(outcome.weight, Quantized)
    return replace(outcome, weight=replace(outcome.weight, input_rotation=True))


def _with_low_rank(q: Quantized | Tensor, W: Tensor, rank: int, H: Tensor | None, dtype: torch.dtype) -> Quantized:
    assert isinstance(q, Quantized)
    return replace(q, low_rank=low_rank(W - q.decode(), rank, H, dtype))


def low_rank(E: Tensor, rank: int, H: Tensor | None, dtype: torch.dtype) -> LowRank:
    """Return the product of a rank that is closest to an error.

    With U the first left singular vectors of E (or of E L, H = L L^T), it is U U^T E either way (Eckart and Young).

    Args:
        E: (out, in).
        rank: of the product.
        H: (in, in); if given, the product is closest in E X, H = X X^T, and otherwise in every element.
        dtype: of the result.
    """
    E = E.double()
    if H is None:
        U = _left_singular(E, rank)
    else:
        damped = H.double()
        damped.diagonal().add_(_DAMPENING * H.diagonal().mean().clamp(min=1e-30))
        U = _left_singular(E @ torch.linalg.cholesky(damped), rank)
    return LowRank(U.to(dtype), (U.T @ E).to(dtype))


def _left_singular(M: Tensor, rank: int) -> Tensor:
    """Return the first left singular vectors (out, rank) of M (out, in) float64, by the smaller Gram matrix."""
    if M.shape[0] <= M.shape[1]:
        U: Tensor = torch.linalg.eigh(M @ M.T).eigenvectors.flip(1)[:, :rank]
    else:
        V = torch.linalg.eigh(M.T @ M).eigenvectors.flip(1)[:, :rank]
        U = torch.linalg.qr(M @ V).Q
    return U


def _compress_beside(stage: LinearStage, task: LinearTask, columns: Tensor) -> Outcome:
    """Compress all columns but some, which stay in 16 bit."""
    W, moments = task.weight, task.moments
    if moments is not None:
        moments = copy.copy(moments)
        moments.D = None
    if not len(columns):
        return _compress(stage, replace(task, moments=moments))
    rounded = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    rounded[columns] = False
    gain = None
    if moments is not None and moments.H is not None:
        gain, moments.H = _eliminate(moments.H, columns, rounded)
    # A column of zeros widens no grid, and its code is exact.
    outcome = _compress(stage, replace(task, weight=W * rounded, moments=moments))
    assert isinstance(outcome.weight, Quantized)
    V = W[:, columns]
    if gain is not None:
        V = torch.where(V == 0, V, V + ((W - outcome.weight.decode()) * rounded) @ gain)
    outliers = Outliers(columns.to(torch.int32), V.to(task.dtype))
    notes = {"outlier_columns": len(columns), "outlier_share": round(len(columns) / W.shape[1], 4)}
    return Outcome(replace(outcome.weight, outliers=outliers), {**outcome.notes, **notes})


def _eliminate(H: Tensor, columns: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return H_:O H_OO^-1 (in, k), and S (in, in), which is zero in the rows and columns of O."""
    H_O = H[:, columns]
    H_OO = H_O[columns].clone()
    H_OO.diagonal().add_(_DAMPENING * H_OO.diagonal().mean().clamp(min=1e-30))
    gain: Tensor = torch.cholesky_solve(H_O.T, torch.linalg.cholesky(H_OO)).T
    S = (H - gain @ H_O.T) * rounded * rounded[:, None]
    # A difference of nearly equal numbers: never below zero on the diagonal, and as symmetric as H.
    S = (S + S.T) / 2
    S.diagonal().clamp_(min=0)
    return gain, S


def _split(outcome: Outcome, task: LinearTask) -> list[Outcome]:
    return [Outcome(_cut(outcome.weight, part.rows), outcome.notes) for part in task.parts]


def _cut(weight: Quantized | Tensor, rows: slice) -> Quantized | Tensor:
    return weight.rows(rows.start, rows.stop) if isinstance(weight, Quantized) else weight[rows]
