"""Sparsities of blocks or linears from a survey of the original model: what is measured, and how it is allocated.

OWL (arXiv 2310.05175): blocks with more outliers among their scores |W_ij| ||X_j|| get lower sparsities. The search
prunes every linear alone to several sparsities, and chooses those with the least sum of errors. An error is the change
of the block's output relative to the output, per token: it is measured at the mean sparsity, and scaled to the other
sparsities by the output error of the linear itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from laconic.solvers.allocate import allocate_sparsity, owl_sparsities
from laconic.solvers.masks import single_linear
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearTask
from laconic.stages.survey import Figures, SurveyedBlock

# Searched sparsities: how far from the mean, in which steps, and the highest.
_REACH, _STEP, _HIGHEST = 0.3, 0.1, 0.95


def measure_outliers(block: SurveyedBlock, m: float) -> Figures:
    """Return the share of a block's scores that are more than m times their mean, as `outliers` of each linear.

    Args:
        block: the block.
        m: scores above so many means are outliers.
    """
    scores = {n: _weight(linear).abs() * block.moments[n].energy.sqrt() for n, linear in block.linears.items()}
    count = sum(A.numel() for A in scores.values())
    mean = sum(float(A.double().sum()) for A in scores.values()) / count
    outliers = sum(int((m * mean < A).sum()) for A in scores.values()) / count
    return {n: {"outliers": outliers} for n in block.linears}


def allocate_by_outliers(
    blocks: Sequence[Figures], sizes: Mapping[str, int], mean: float, reach: float
) -> dict[str, float]:
    """Return the sparsity of each linear, the same in a block, by OWL.

    Args:
        blocks: figures of `measure_outliers` of each block.
        sizes: number of weights of each linear.
        mean: sparsity over all weights.
        reach: `owl_lambda`, how far a block's sparsity may be from the mean.
    """
    outliers = [next(iter(block.values()))["outliers"] for block in blocks]
    weights = [sum(sizes[n] for n in block) for block in blocks]
    shares = owl_sparsities(outliers, weights, mean, reach)
    return {n: share for block, share in zip(blocks, shares, strict=True) for n in block}


def measure_errors(block: SurveyedBlock, mean: float, prune: Callable[[LinearTask], Tensor]) -> Figures:
    """Return the error at each searched sparsity, as `errors` of each linear, the other linears being dense.

    Args:
        block: the block, with Hessians.
        mean: sparsity over all weights, around which others are searched.
        prune: returns the pruned weight of a task.
    """
    figures: Figures = {}
    for name, linear in block.linears.items():
        W, moments = _weight(linear), block.moments[name]
        errors, at_mean = [], W
        for share in _candidates(mean):
            pruned = prune(LinearTask(W, None, moments, linear.weight.dtype, single_linear(W, share)))
            errors.append(_output_error(W - pruned, moments))
            at_mean = pruned if share == mean else at_mean
        block_error = block.output_change({name: at_mean})
        error_at_mean = errors[_candidates(mean).index(mean)]
        figures[name] = {"errors": [block_error * e / error_at_mean if error_at_mean else 0.0 for e in errors]}
    return figures


def allocate_by_errors(blocks: Sequence[Figures], sizes: Mapping[str, int], mean: float) -> dict[str, float]:
    """Return the sparsity of each linear with the least sum of errors.

    Args:
        blocks: figures of `measure_errors` of each block.
        sizes: number of weights of each linear.
        mean: sparsity over all weights.
    """
    errors = {n: figures["errors"] for block in blocks for n, figures in block.items()}
    shares = allocate_sparsity([*errors.values()], [sizes[n] for n in errors], _candidates(mean), mean)
    return dict(zip(errors, shares, strict=True))


def _weight(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().float()


def _output_error(E: Tensor, moments: Moments) -> float:
    """Return tr(E H E^T), the squared error of the output for an error E (out, in) of the weight."""
    assert moments.H is not None
    return float(((E @ moments.H) * E).sum())


def _candidates(mean: float) -> list[float]:
    """Return the sparsities that are tried, from the highest."""
    steps = round(_REACH / _STEP)
    around = [mean if k == 0 else round(mean + k * _STEP, 6) for k in range(steps, -steps - 1, -1)]
    return [share for share in around if 0 <= share <= _HIGHEST or share == mean]
