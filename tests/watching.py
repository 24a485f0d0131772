"""Stages that change little and keep what the walk shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from laconic.artifact.workspace import Workspace
from laconic.checkpoint.source import arrange_source, build_skeleton, open_source
from laconic.solvers.moments import Moments
from laconic.stages.block import Block, BlockStage
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.stage import Needs, Stage
from laconic.structure.anatomy import dissect
from laconic.walk.plan import Plan, make_plan
from laconic.walk.settings import Settings
from laconic.walk.walk import walk


class Watch(LinearStage):
    """Keeps the moments that it is given; makes weights `factor` times as large, so that its effect can be seen."""

    method: Literal["watch"] = "watch"
    factor: float = 1.0
    true_sequential: bool = True
    with_original: bool = False
    ignore: tuple[str, ...] = ()
    _seen: list[Moments] = PrivateAttr(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(second_moments=True, cross_moments=self.with_original, sequential=self.true_sequential)

    def compress(self, task: LinearTask) -> Outcome:
        assert task.moments is not None
        self._seen.append(task.moments)
        return Outcome(task.weight * self.factor)


class Learn(BlockStage):
    """Changes nothing, and keeps what each block puts out in the original model."""

    method: Literal["learn"] = "learn"
    _taught: list[Tensor] = PrivateAttr(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(activations=True, cross_moments=True)

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        assert block.original_output is not None
        self._taught.append(block.original_output.hidden.clone())
        return {}


def stroll(
    model: Path,
    output: Path,
    windows: Tensor,
    *stages: Stage,
    batch: int = 4,
    budget: float = 1e9,
    all_experts: bool = False,
) -> list[dict[str, Moments]]:
    """Walk through a model. Returns: for each stage that watches what it saw, by the first linear of each tap
    that it treats."""
    source = open_source(str(model))
    whole = build_skeleton(source.config, source.dtype)
    source = arrange_source(source, whole)
    plan = make_plan(whole, dissect(whole), stages)
    workspace = Workspace(output, {}, len(plan.anatomy.taps) + 1, overwrite=False)
    settings = Settings(torch.device("cpu"), batch, budget, all_experts)
    walk(source, whole, plan, windows, workspace=workspace, settings=settings, report=lambda _: None)
    return [dict(zip(_taps(plan, i), s._seen, strict=True)) for i, s in enumerate(stages) if isinstance(s, Watch)]


def _taps(plan: Plan, stage: int) -> list[str]:
    inside = [
        [f"{plan.anatomy.block_name(i)}.{n}" for n in tap.linears]
        for i, taps in enumerate(plan.anatomy.taps)
        for tap in taps
    ]
    touched = ([n for n in names if n in plan.targets[stage]] for names in (*inside, [plan.anatomy.head]))
    return [names[0] for names in touched if names]
