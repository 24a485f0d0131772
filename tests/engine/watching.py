"""A stage that changes little and keeps what the walk shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from laconic.engine.plan import Plan, make_plan
from laconic.engine.stage import LinearStage, Outcome
from laconic.engine.walk import Settings, walk
from laconic.engine.writer import Workspace
from laconic.model.anatomy import dissect
from laconic.model.load import arranged, open_source, skeleton
from laconic.solvers.moments import Moments


class Watch(LinearStage):
    """Keeps the moments that it is given; makes weights `factor` times as large, so that its effect can be seen."""

    method: Literal["watch"] = "watch"
    factor: float = 1.0
    true_sequential: bool = True
    with_original: bool = False
    ignore: tuple[str, ...] = ()
    _seen: list[Moments] = PrivateAttr(default_factory=list)

    @property
    def gram(self) -> bool:
        return True

    @property
    def cross(self) -> bool:
        return self.with_original

    @property
    def sequential(self) -> bool:
        return self.true_sequential

    def compress(self, weight: Tensor, moments: Moments | None, dtype: torch.dtype) -> Outcome:
        assert moments is not None
        self._seen.append(moments)
        return Outcome(weight * self.factor)


def stroll(
    model: Path,
    output: Path,
    windows: Tensor,
    *stages: Watch,
    batch: int = 4,
    budget: float = 1e9,
    all_experts: bool = False,
) -> list[dict[str, Moments]]:
    """Walk through a model with stages that watch. Returns: for each stage what it saw, by the tap's first linear."""
    source = open_source(str(model))
    whole = skeleton(source.config, source.dtype)
    source = arranged(source, whole)
    plan = make_plan(whole, dissect(whole), stages)
    workspace = Workspace(output, {}, len(plan.anatomy.taps) + 1, overwrite=False)
    settings = Settings(torch.device("cpu"), batch, budget, all_experts)
    walk(source, whole, plan, windows, workspace, settings, lambda _: None)
    return [dict(zip(_taps(plan, i), s._seen, strict=True)) for i, s in enumerate(stages)]


def _taps(plan: Plan, stage: int) -> list[str]:
    inside = [
        f"{plan.anatomy.block_name(i)}.{tap.linears[0]}" for i, taps in enumerate(plan.anatomy.taps) for tap in taps
    ]
    return [name for name in (*inside, plan.anatomy.head) if name in plan.touched[stage]]
