"""One linear and its calibration activations, for methods tried without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laconic.formats import Quantized
from laconic.solvers.masks import StackedLinear
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.pruning import Masking
from laconic.stages.quantizing import QuantizingStage
from laconic.walk.side_tensors import compress_stack


def correlated(tokens: int = 512, n: int = 128, *, seed: int = 0) -> Tensor:
    """Activations as a trained model has them: a few loud directions, and inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.logspace(0, -2, n)
    return (torch.randn(tokens, n, generator=generator) * loud) @ torch.randn(n, n, generator=generator) / n**0.5


def weight(rows: int = 96, n: int = 128) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(7)) / n**0.5


def moments_of(x: Tensor, x_full: Tensor | None = None, *, gram: bool = True) -> Moments:
    moments = Moments(x.shape[1], torch.device("cpu"), gram=gram, cross=x_full is not None)
    moments.add(x, x_full)
    return moments.finish()


def task_of(
    stage: LinearStage, W: Tensor, moments: Moments | None, dtype: torch.dtype, rows: Sequence[int] = ()
) -> LinearTask:
    """Linears of so many rows (one, if nothing is said) as the walk gives them to a stage."""
    stops = torch.tensor([*rows] or [len(W)]).cumsum(0).tolist()
    share = stage.share if isinstance(stage, Masking) and stage.prunes else 0.0
    parts = [StackedLinear(slice(a, b), share) for a, b in zip([0, *stops], stops, strict=False)]
    scheme = stage.scheme_for((len(W), W.shape[1])) if isinstance(stage, QuantizingStage) else None
    return LinearTask(W, scheme, moments, dtype, parts)


def compressed(
    stage: LinearStage, W: Tensor, moments: Moments | None, dtype: torch.dtype, rows: Sequence[int] = ()
) -> list[Outcome]:
    """What comes of each of some stacked linears."""
    return compress_stack(stage, task_of(stage, W, moments, dtype, rows))


def made_of(stage: LinearStage, W: Tensor, x: Tensor, x_full: Tensor | None = None) -> Tensor:
    """What a stage makes of a weight whose input is x (and was x_full in the original model), decoded."""
    made = compressed(stage, W, moments_of(x, x_full, gram=stage.needs.second_moments), torch.bfloat16)[0].weight
    return made.decode() if isinstance(made, Quantized) else made


def output_error(W: Tensor, Q: Tensor, x: Tensor, x_full: Tensor | None = None) -> float:
    """||Q x - W x_full||^2 over the tokens, in float64."""
    truth = x if x_full is None else x_full
    return float((x.double() @ Q.double().T - truth.double() @ W.double().T).square().sum())
