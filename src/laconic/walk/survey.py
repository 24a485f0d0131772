"""A look at the original model from end to end, before its first block is pruned: what each linear is to lose.

Block by block, as the walk goes, in one forward pass. Only figures are kept; they are written down before anything
else, so that a restarted run goes by the same ones.

OWL (arXiv 2310.05175): blocks with more outliers among their scores |W_ij| ||X_j|| keep more. The search prunes every
linear to several sparsities, each alone, and shares out what is kept so that errors sum up to the least. It counts the
change in what the block puts out, as a share of it, token by token: measured at the mean sparsity, and at the others in
the proportion of the linear's own output error.
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
from laconic.structure.anatomy import BlockCall, linear_at
from laconic.train.block_tuning import replaced_linears
from laconic.walk.domain import most
from laconic.walk.plan import Plan

Figures = dict[str, dict[str, Any]]
"""Of linears, by full name: what was found, and at last the sparsity."""

# How far a searched sparsity may be from the mean, and in what steps errors are measured.
_REACH, _STEP, _HIGHEST = 0.3, 0.1, 0.95

# Tokens on which the change in a block's output is measured.
_SAMPLE = 4096


def survey_block(
    block: nn.Module, i: int, plan: Plan, call: BlockCall, stream: Stream, device: torch.device
) -> list[Figures]:
    """What each stage that asks for it wants to know of block i; leaves in the stream what the block puts out."""
    name, taps = plan.anatomy.block_name(i), plan.anatomy.taps[i]
    gram = any(isinstance(s, PruningStage) and s.allocation == "search" for s in plan.stages)
    sample = stream.hidden[: max(1, _SAMPLE // stream.hidden.shape[1])].to(device, copy=True)
    with Passes(block, taps, call, stream, device, held=False) as passes:
        moments = observe(passes, taps, gram=gram, through=True)
    found: list[Figures] = []
    for stage, names in zip(plan.stages, plan.targets, strict=True):
        linears = {n: m for tap, m in moments.items() for n in tap.linears if f"{name}.{n}" in names}
        if not isinstance(stage, PruningStage) or not stage.needs.survey or not linears:
            found.append({})
            continue
        figures = (
            _outliers(block, linears, stage.owl_m)
            if stage.allocation == "owl"
            else _errors(block, linears, stage, call, sample)
        )
        found.append({f"{name}.{n}": told for n, told in figures.items()})
    return found


def allot(plan: Plan, found: Sequence[Figures]) -> list[Figures]:
    """The figures with the sparsity of each linear. found: of each stage, of all blocks."""
    return [
        _allot(plan, stage, figures) if isinstance(stage, PruningStage) and figures else {}
        for stage, figures in zip(plan.stages, found, strict=True)
    ]


def by_survey(plan: Plan, allotted: Sequence[Mapping[str, Mapping[str, Any]]]) -> Plan:
    """The plan with the sparsities that the survey found."""
    shares = [
        {n: _by_figures(plan, n, part, figures.get(n, {})) for n, part in own.items()}
        for own, figures in zip(plan.parts, allotted, strict=True)
    ]
    return replace(plan, parts=tuple(shares))


def _by_figures(plan: Plan, name: str, part: StackedLinear, figures: Mapping[str, Any]) -> StackedLinear:
    protected = None
    if figures.get("heads"):
        block, _, linear = name.removeprefix(f"{plan.anatomy.blocks}.").partition(".")
        protected = plan.heads[int(block)].protected(linear, set(figures["heads"]))
    return replace(part, sparsity=figures.get("sparsity", part.sparsity), protected=protected)


def protect(plan: Plan, number: int, shares: Sequence[Sequence[float]]) -> Figures:
    """Which heads stage `number` leaves whole, for each linear that has any. shares: what heads count, by block."""
    stage = plan.stages[number]
    assert isinstance(stage, PruningStage)
    assert stage.protect is not None
    chosen = most(shares, stage.protect.heads)
    return {
        f"{plan.anatomy.block_name(i)}.{n}": {"heads": own}
        for i, (heads, own) in enumerate(zip(plan.heads, chosen, strict=True))
        for n in (*heads.rows, heads.output)
        if own
    }


def _allot(plan: Plan, stage: PruningStage, figures: Figures) -> Figures:
    sizes = {n: plan.linears[n][0] * plan.linears[n][1] for n in figures}
    if stage.allocation == "search":
        names = list(figures)
        errors = [figures[n]["errors"] for n in names]
        shares = allocate_sparsity(errors, [sizes[n] for n in names], _tried(stage.share), stage.share)
        return {n: {**figures[n], "sparsity": share} for n, share in zip(names, shares, strict=True)}
    blocks: dict[str, list[str]] = {}
    for n in figures:
        block = n.removeprefix(f"{plan.anatomy.blocks}.").partition(".")[0]
        blocks.setdefault(block, []).append(n)
    outliers = [figures[own[0]]["outliers"] for own in blocks.values()]
    weights = [sum(sizes[n] for n in own) for own in blocks.values()]
    shares = owl_sparsities(outliers, weights, stage.share, stage.owl_lambda)
    return {
        n: {**figures[n], "sparsity": share} for own, share in zip(blocks.values(), shares, strict=True) for n in own
    }


def _outliers(block: nn.Module, linears: Mapping[str, Moments], m: float) -> Figures:
    """The share of a block's scores that are more than m times their mean."""
    scores = {n: linear_at(block, n).weight.detach().float().abs() * seen.energy.sqrt() for n, seen in linears.items()}
    count = sum(A.numel() for A in scores.values())
    mean = sum(float(A.double().sum()) for A in scores.values()) / count
    outliers = sum(int((m * mean < A).sum()) for A in scores.values()) / count
    return {n: {"outliers": outliers} for n in linears}


def _errors(
    block: nn.Module, linears: Mapping[str, Moments], stage: PruningStage, call: BlockCall, sample: Tensor
) -> Figures:
    """What each linear costs the block at several sparsities, the other linears being whole."""
    expected = call(block, sample).float()
    size = expected.square().sum(-1).clamp(min=1e-30)
    found: Figures = {}
    for name, seen in linears.items():
        linear = linear_at(block, name)
        W = linear.weight.detach().float()
        own, ours = [], W
        for share in _tried(stage.share):
            made = stage.compress(LinearTask(W, None, seen, linear.weight.dtype, single_linear(W, share))).weight
            assert isinstance(made, Tensor)
            own.append(_own_error(W - made, seen))
            ours = made if share == stage.share else ours
        with replaced_linears(block, {name: ours}):
            change = call(block, sample).float() - expected
        cost = float((change.square().sum(-1) / size).mean())
        at = own[_tried(stage.share).index(stage.share)]
        found[name] = {"errors": [cost * e / at if at else 0.0 for e in own]}
    return found


def _own_error(E: Tensor, seen: Moments) -> float:
    assert seen.H is not None
    return float(((E @ seen.H) * E).sum())


def _tried(mean: float) -> list[float]:
    """Sparsities to try, from the highest."""
    steps = round(_REACH / _STEP)
    around = [mean if k == 0 else round(mean + k * _STEP, 6) for k in range(steps, -steps - 1, -1)]
    return [share for share in around if 0 <= share <= _HIGHEST or share == mean]
