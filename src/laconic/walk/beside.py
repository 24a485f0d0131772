"""What is kept beside the codes in 16 bit, the same for every method: outlier columns, and a low-rank product.

Outlier columns are not rounded, so they can answer for the errors of those that are. With E = W - Q over the rounded
columns R, and the columns O free, ||E_R X_R + (W_O - V) X_O||^2 is least at V = W_O + E_R H_RO H_OO^-1, and what is
left of it is tr(E_R S E_R^T), S = H_RR - H_RO H_OO^-1 H_OR. A method therefore rounds R under S, as it rounds any
weight; in GPTQ's own terms, the outlier columns come last and take up the feedback. (Columns in 16 bit: LLM.int8,
arXiv 2208.07339; OWQ, arXiv 2306.02272.)

The low-rank product is that of ZeroQuant-V2 (LoRC, arXiv 2303.08302): the best of rank r for W - Q by singular values.
Where the method looked at second moments H, it is the best for (W - Q) X instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laconic.formats import LowRank, Outliers, Quantized
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.stages.pruning import Masking
from laconic.stages.stage import LinearStage, Outcome, QuantizingStage, Stage

# Share of the mean of diag(H_OO) added to it, as GPTQ does with all of H.
_DAMPENING = 0.01


def compress_tap(
    stage: LinearStage,
    weight: Tensor,
    rows: Sequence[int],
    moments: Moments | None,
    dtype: torch.dtype,
    shares: Sequence[StackedLinear] = (),
) -> list[Outcome]:
    """What a stage makes of the linears of one tap, each with what is kept beside its codes.

    weight: (out, in) float32, the linears' rows together. rows: how many each linear has. dtype: of what is stored.
    shares: what a stage that prunes takes of each linear, if that is not the same of all.
    """
    parts = _parts(rows)
    if isinstance(stage, Masking) and stage.prunes:
        shares = shares or [StackedLinear(part, stage.share) for part in parts]
        own = [
            replace(
                share,
                rows=part,
                protected=share.protected if share.protected is None else share.protected.to(weight.device),
            )
            for share, part in zip(shares, parts, strict=True)
        ]
        made = stage.prune(weight, own, moments, dtype)
        return [Outcome(_rows(made.weight, part), made.notes) for part in parts]
    columns = stage.outliers(moments).to(weight.device) if isinstance(stage, QuantizingStage) else weight.new_empty(0)
    if not isinstance(stage, QuantizingStage) or not (len(columns) or stage.low_rank):
        made = stage.compress(weight, moments, dtype)
        return [Outcome(_rows(made.weight, part), made.notes) for part in parts]
    # Zeros stay zeros, wherever a target would have moved them.
    target = stage.target(weight, moments) * (weight != 0)
    made = _round(stage, target, columns, moments, dtype)
    assert isinstance(made.weight, Quantized)
    outcomes = []
    for part in parts:
        q = made.weight.rows(part.start, part.stop)
        if stage.low_rank:
            H = moments.H if moments is not None else None
            q = replace(q, low_rank=low_rank(target[part] - q.decode(), stage.low_rank, H, dtype))
        outcomes.append(Outcome(q, made.notes))
    return outcomes


def attach(
    stage: Stage, weight: Tensor, outcome: Outcome, rows: Sequence[int], moments: Moments | None, dtype: torch.dtype
) -> list[Outcome]:
    """What a block stage made of the stacked linears of a tap, each with what is kept beside its codes: the outlier
    columns as they are, and a product for what is left over elsewhere. As in `compress_tap`."""
    made = outcome.weight
    if isinstance(made, Quantized) and isinstance(stage, QuantizingStage):
        columns = stage.outliers(moments).to(weight.device)
        if len(columns):
            made = replace(made, outliers=Outliers(columns.to(torch.int32), weight[:, columns].to(dtype)))
    outcomes = []
    for part in _parts(rows):
        piece = _rows(made, part)
        if isinstance(piece, Quantized) and isinstance(stage, QuantizingStage) and stage.low_rank:
            piece = replace(piece, low_rank=low_rank(weight[part] - piece.decode(), stage.low_rank, None, dtype))
        outcomes.append(Outcome(piece, outcome.notes))
    return outcomes


def low_rank(E: Tensor, rank: int, H: Tensor | None, dtype: torch.dtype) -> LowRank:
    """The product of this rank that is closest to E (out, in): in every element, or in E X where H = X X^T is given.

    With U the first left singular vectors of E (or of E L, H = L L^T), it is U U^T E either way (Eckart and Young).
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
    """The first left singular vectors of M (out, in) float64, by the Gram matrix of its shorter side: (out, rank)."""
    if M.shape[0] <= M.shape[1]:
        U: Tensor = torch.linalg.eigh(M @ M.T).eigenvectors.flip(1)[:, :rank]
    else:
        V = torch.linalg.eigh(M.T @ M).eigenvectors.flip(1)[:, :rank]
        U = torch.linalg.qr(M @ V).Q
    return U


def _round(stage: LinearStage, W: Tensor, columns: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
    """`stage.compress` on all columns but some, which are kept."""
    if moments is not None:
        moments = copy.copy(moments)
        moments.D = None
    if not len(columns):
        return stage.compress(W, moments, dtype)
    rounded = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    rounded[columns] = False
    answer = None
    if moments is not None and moments.H is not None:
        answer, moments.H = _eliminate(moments.H, columns, rounded)
    # At zero a column is in nobody's way: it widens no grid, and its code is exact.
    made = stage.compress(W * rounded, moments, dtype)
    assert isinstance(made.weight, Quantized)
    kept = W[:, columns]
    if answer is not None:
        kept = torch.where(kept == 0, kept, kept + ((W - made.weight.decode()) * rounded) @ answer)
    outliers = Outliers(columns.to(torch.int32), kept.to(dtype))
    share = {"outlier_columns": len(columns), "outlier_share": round(len(columns) / W.shape[1], 4)}
    return Outcome(replace(made.weight, outliers=outliers), {**made.notes, **share})


def _eliminate(H: Tensor, columns: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """H_:O H_OO^-1 (in, k), by which errors are answered for; and S (in, in), zero in the rows and columns of O."""
    H_O = H[:, columns]
    H_OO = H_O[columns].clone()
    H_OO.diagonal().add_(_DAMPENING * H_OO.diagonal().mean().clamp(min=1e-30))
    answer: Tensor = torch.cholesky_solve(H_O.T, torch.linalg.cholesky(H_OO)).T
    S = (H - answer @ H_O.T) * rounded * rounded[:, None]
    # A difference of nearly equal numbers: never below zero on the diagonal, and as symmetric as H.
    S = (S + S.T) / 2
    S.diagonal().clamp_(min=0)
    return answer, S


def _parts(rows: Sequence[int]) -> list[slice]:
    stops = torch.tensor(rows).cumsum(0).tolist()
    return [slice(stop - n, stop) for n, stop in zip(rows, stops, strict=True)]


def _rows(made: Quantized | Tensor, part: slice) -> Quantized | Tensor:
    return made.rows(part.start, part.stop) if isinstance(made, Quantized) else made[part]
