"""The survey: a pass over the whole original model before its first block is pruned, which sets sparsities and heads.

The blocks run one after another, as in the walk. Only figures are kept; they are written to the workspace before
anything else, so that a restarted run uses the same ones.

OWL (arXiv 2310.05175): blocks with more outliers among their scores |W_ij| ||X_j|| get lower sparsities. The search
prunes every linear alone to several sparsities, and chooses those with the least sum of errors. An error is the change
of the block's output relative to the output, per token: it is measured at the mean sparsity, and scaled to the other
sparsities by the output error of the linear itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import observe
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.solvers.allocate import allocate_sparsity, owl_sparsities
from laconic.solvers.masks import StackedLinear, single_linear
from laconic.solvers.moments import Moments
from laconic.stages.linear import LinearTask
from laconic.stages.pruning import PruningStage
from laconic.structure.anatomy import linear_at
from laconic.structure.calls import BlockCall
from laconic.train.block_tuning import replaced_linears
from laconic.walk.head_importance import most_important
from laconic.walk.plan import Plan

Figures = dict[str, dict[str, Any]]
"""Figures of linears, by full name: `outliers` (OWL), `errors` (search), and at the end `sparsity` and `heads`."""

# Searched sparsities: how far from the mean, in which steps, and the highest.
_REACH, _STEP, _HIGHEST = 0.3, 0.1, 0.95

# Tokens on which the change of a block's output is measured.
_SAMPLE = 4096


def survey_block(
    block: nn.Module, i: int, plan: Plan, *, call: BlockCall, stream: Stream, device: torch.device
) -> list[Figures]:
    """Measure what the stages need to know of a block, and replace the stream's hidden states by the block's output.

    Args:
        block: of the original model.
        i: its number.
        plan: of the walk.
        call: how the block is called.
        stream: hidden states before the block.
        device: where to compute.

    Returns:
        The figures of each stage of the plan; empty for stages that need no survey.

    Raises:
        ValueError: if the activations hold NaN or infinity.
    """
    name, taps = plan.anatomy.block_name(i), plan.anatomy.taps[i]
    gram = any(isinstance(s, PruningStage) and s.allocation == "search" for s in plan.stages)
    sample = stream.hidden[: max(1, _SAMPLE // stream.hidden.shape[1])].to(device, copy=True)
    with Passes(block, taps, call, stream, device, resume=False) as passes:
        moments = observe(passes, taps, gram=gram, advance=True)
    by_stage: list[Figures] = []
    for stage, names in zip(plan.stages, plan.targets, strict=True):
        linears = {n: m for tap, m in moments.items() for n in tap.linears if f"{name}.{n}" in names}
        if not isinstance(stage, PruningStage) or not stage.needs.survey or not linears:
            by_stage.append({})
            continue
        figures = (
            _outliers(block, linears, stage.owl_m)
            if stage.allocation == "owl"
            else _errors(block, linears, stage, call, sample)
        )
        by_stage.append({f"{name}.{n}": of_linear for n, of_linear in figures.items()})
    return by_stage


def set_sparsities(plan: Plan, by_stage: Sequence[Figures]) -> list[Figures]:
    """Return the figures of all blocks with the `sparsity` of each linear added.

    Args:
        plan: of the walk.
        by_stage: figures of each stage.
    """
    return [
        _allocate(plan, stage, figures) if isinstance(stage, PruningStage) and figures else {}
        for stage, figures in zip(plan.stages, by_stage, strict=True)
    ]


def protect_heads(plan: Plan, number: int, importance: Sequence[Sequence[float]]) -> Figures:
    """Choose the heads that a stage leaves whole.

    Args:
        plan: of the walk.
        number: of the stage in the plan.
        importance: of the heads of each block.

    Returns:
        The numbers of the heads as `heads`, for each linear of their attention.
    """
    stage = plan.stages[number]
    assert isinstance(stage, PruningStage)
    assert stage.protect is not None
    numbers_by_block = most_important(importance, stage.protect.heads)
    return {
        f"{plan.anatomy.block_name(i)}.{n}": {"heads": numbers}
        for i, (heads, numbers) in enumerate(zip(plan.heads, numbers_by_block, strict=True))
        for n in (*heads.rows, heads.output)
        if numbers
    }


def with_survey(plan: Plan, by_stage: Sequence[Mapping[str, Mapping[str, Any]]]) -> Plan:
    """Return the plan with the sparsities and heads of the survey.

    Args:
        plan: of the walk.
        by_stage: figures of each stage.
    """
    parts = [
        {n: _with_figures(plan, n, part, figures.get(n, {})) for n, part in of_stage.items()}
        for of_stage, figures in zip(plan.parts, by_stage, strict=True)
    ]
    return replace(plan, parts=tuple(parts))


def _with_figures(plan: Plan, name: str, part: StackedLinear, figures: Mapping[str, Any]) -> StackedLinear:
    protected = None
    if figures.get("heads"):
        block, _, linear = name.removeprefix(f"{plan.anatomy.blocks}.").partition(".")
        protected = plan.heads[int(block)].protected(linear, set(figures["heads"]))
    return replace(part, sparsity=figures.get("sparsity", part.sparsity), protected=protected)


def _allocate(plan: Plan, stage: PruningStage, figures: Figures) -> Figures:
    sizes = {n: plan.linears[n][0] * plan.linears[n][1] for n in figures}
    if stage.allocation == "search":
        names = list(figures)
        errors = [figures[n]["errors"] for n in names]
        shares = allocate_sparsity(errors, [sizes[n] for n in names], _candidates(stage.share), stage.share)
        return {n: {**figures[n], "sparsity": share} for n, share in zip(names, shares, strict=True)}
    blocks: dict[str, list[str]] = {}
    for n in figures:
        block = n.removeprefix(f"{plan.anatomy.blocks}.").partition(".")[0]
        blocks.setdefault(block, []).append(n)
    outliers = [figures[names[0]]["outliers"] for names in blocks.values()]
    weights = [sum(sizes[n] for n in names) for names in blocks.values()]
    shares = owl_sparsities(outliers, weights, stage.share, stage.owl_lambda)
    return {
        n: {**figures[n], "sparsity": share}
        for names, share in zip(blocks.values(), shares, strict=True)
        for n in names
    }


def _outliers(block: nn.Module, linears: Mapping[str, Moments], m: float) -> Figures:
    """Return the share of a block's scores that are more than m times their mean."""
    scores = {
        n: linear_at(block, n).weight.detach().float().abs() * moments.energy.sqrt() for n, moments in linears.items()
    }
    count = sum(A.numel() for A in scores.values())
    mean = sum(float(A.double().sum()) for A in scores.values()) / count
    outliers = sum(int((m * mean < A).sum()) for A in scores.values()) / count
    return {n: {"outliers": outliers} for n in linears}


def _errors(
    block: nn.Module, linears: Mapping[str, Moments], stage: PruningStage, call: BlockCall, sample: Tensor
) -> Figures:
    """Return the error of each linear at each candidate sparsity, the other linears being dense."""
    samples = slice(0, len(sample))
    expected = call(block, sample, samples).float()
    size = expected.square().sum(-1).clamp(min=1e-30)
    figures: Figures = {}
    for name, moments in linears.items():
        linear = linear_at(block, name)
        W = linear.weight.detach().float()
        errors, at_mean = [], W
        for share in _candidates(stage.share):
            pruned = stage.compress(LinearTask(W, None, moments, linear.weight.dtype, single_linear(W, share))).weight
            assert isinstance(pruned, Tensor)
            errors.append(_output_error(W - pruned, moments))
            at_mean = pruned if share == stage.share else at_mean
        with replaced_linears(block, {name: at_mean}):
            change = call(block, sample, samples).float() - expected
        block_error = float((change.square().sum(-1) / size).mean())
        error_at_mean = errors[_candidates(stage.share).index(stage.share)]
        figures[name] = {"errors": [block_error * e / error_at_mean if error_at_mean else 0.0 for e in errors]}
    return figures


def _output_error(E: Tensor, moments: Moments) -> float:
    """Return tr(E H E^T), the squared error of the output for an error E (out, in) of the weight."""
    assert moments.H is not None
    return float(((E @ moments.H) * E).sum())


def _candidates(mean: float) -> list[float]:
    """Return the sparsities that are tried, from the highest."""
    steps = round(_REACH / _STEP)
    around = [mean if k == 0 else round(mean + k * _STEP, 6) for k in range(steps, -steps - 1, -1)]
    return [share for share in around if 0 <= share <= _HIGHEST or share == mean]
