"""The survey: a pass over the whole original model before its first block is compressed.

The blocks run one after another, as in the walk. Stages that need it measure each block, and sparsities and heads
follow from their figures. Only figures are kept; they are written to the workspace before anything else, so that a
restarted run uses the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laconic.calibrate.observe import observe
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.solvers.masks import StackedLinear
from laconic.stages.linear import WeightStage
from laconic.stages.pruning import PruningStage
from laconic.stages.survey import Figures, SurveyedBlock
from laconic.structure.anatomy import linear_at
from laconic.structure.calls import BlockCall
from laconic.train.block_tuning import replaced_linears
from laconic.walk.head_importance import most_important
from laconic.walk.outcomes import check_figures
from laconic.walk.plan import Plan

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
    gram = any(s.needs.survey_second_moments for s in plan.stages)
    sample = stream.hidden[: max(1, _SAMPLE // stream.hidden.shape[1])].to(device, copy=True)
    with Passes(block, taps, call, stream, device, resume=False) as passes:
        moments = observe(passes, taps, gram=gram, advance=True)
    output_change = _OutputChange(block, call, sample)
    by_stage: list[Figures] = []
    for stage, names in zip(plan.stages, plan.targets, strict=True):
        linears = {n: m for tap, m in moments.items() for n in tap.linears if f"{name}.{n}" in names}
        if not stage.needs.survey or not linears:
            by_stage.append({})
            continue
        figures = stage.survey(SurveyedBlock({n: linear_at(block, n) for n in linears}, linears, output_change))
        check_figures(stage, figures, linears)
        by_stage.append({f"{name}.{n}": of_linear for n, of_linear in figures.items()})
    return by_stage


def set_sparsities(plan: Plan, by_stage: Sequence[Figures]) -> list[Figures]:
    """Return the figures of all blocks with the `sparsity` of each linear to which a stage allocates one.

    Args:
        plan: of the walk.
        by_stage: figures of each stage.
    """
    return [
        _allocate(plan, stage, figures) if figures else {} for stage, figures in zip(plan.stages, by_stage, strict=True)
    ]


def _allocate(plan: Plan, stage: WeightStage, figures: Figures) -> Figures:
    blocks: dict[str, Figures] = {}
    for n, of_linear in figures.items():
        blocks.setdefault(n.removeprefix(f"{plan.anatomy.blocks}.").partition(".")[0], {})[n] = of_linear
    sizes = {n: plan.linears[n][0] * plan.linears[n][1] for n in figures}
    shares = stage.allocate([*blocks.values()], sizes)
    return {n: {**f, "sparsity": shares[n]} if n in shares else f for n, f in figures.items()}


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


@dataclass(frozen=True)
class _OutputChange:
    """The change of a block's output on a sample, for `SurveyedBlock.output_change`."""

    block: nn.Module
    call: BlockCall
    sample: Tensor

    @cached_property
    def _expected(self) -> Tensor:
        return self.call(self.block, self.sample, slice(0, len(self.sample))).float()

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        expected = self._expected
        with replaced_linears(self.block, weights):
            change = self.call(self.block, self.sample, slice(0, len(self.sample))).float() - expected
        size = expected.square().sum(-1).clamp(min=1e-30)
        return float((change.square().sum(-1) / size).mean())
