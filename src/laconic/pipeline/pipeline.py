"""A recipe as a pipeline of steps, every one checked before the first begins.

Neighbouring stages that treat linears, blocks or the cache share one walk; a stage that needs the whole model is a step
of its own. Each step reads a checkpoint folder and writes one, the last of them the artifact. A recipe of one step is a
pipeline of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.identity import check_identity, differing_keys, read_identity
from laconic.checkpoint.extra import describe_extra, extra_names
from laconic.checkpoint.source import Source, arrange_source, build_skeleton
from laconic.checkpoint.trust import Trust
from laconic.pipeline.calibration import calibration_ids, device_of
from laconic.pipeline.order import ModelState, check_order
from laconic.pipeline.provenance import identify
from laconic.pipeline.step_folders import check_own_folder, step_folder
from laconic.pipeline.walk_step import Walk, check_texts, plan_walk
from laconic.recipe import Recipe
from laconic.stages.model import ModelStage
from laconic.stages.stage import Stage
from laconic.train.ranks import is_main
from laconic.walk.forecast import Forecast


@dataclass(frozen=True)
class Step:
    """Stages that go together: those of one walk, or one that needs the whole model.

    Attributes:
        first: number of the first of them in the recipe.
        stages: the stages.
        walk: the walk, planned on the original's shape; None for a stage that needs the whole model.
        output: the folder that the step writes.
        identity: what that folder is made of; a run that was interrupted resumes only with the same.
    """

    first: int
    stages: tuple[Stage, ...]
    walk: Walk | None
    output: Path
    identity: dict[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A recipe that passed every check.

    Attributes:
        recipe: the recipe, with its model and output.
        source: the original checkpoint.
        steps: in order.
        windows: calibration token ids (samples, tokens); None where no stage needs any.
        output: the folder of the artifact.
        trust: what the files of the model may do.
        shared: whether steps but the last are kept for other recipes.
        extra_tensors: what the checkpoint has beside its text model, in words; empty if it has nothing.
    """

    recipe: Recipe
    source: Source
    steps: tuple[Step, ...]
    windows: Tensor | None
    output: Path
    trust: Trust
    shared: bool = False
    extra_tensors: str = ""

    @property
    def is_one_walk(self) -> bool:
        """Whether it is a single walk, without stages that need the whole model."""
        return len(self.steps) == 1 and self.steps[0].walk is not None

    @property
    def walk(self) -> Walk | None:
        """The last walk, as if no earlier step reshaped the model; None where there is none."""
        return next((step.walk for step in reversed(self.steps) if step.walk), None)

    @property
    def forecast(self) -> Forecast | None:
        """Size and memory of the last walk."""
        return self.walk.forecast(self.windows) if self.walk else None

    @property
    def identity(self) -> dict[str, Any]:
        """Recipe, checkpoint, texts and version of laconic that the artifact is made of."""
        return self.steps[-1].identity


def build_pipeline(
    recipe: Recipe, source: Source, output: Path, *, shared: Path | None, overwrite: bool, trust: Trust
) -> Pipeline:
    """Check a recipe against a model, step by step, and plan each step.

    Args:
        recipe: with its model and output.
        source: the original checkpoint.
        output: the folder of the artifact.
        shared: a folder of steps that many recipes share.
        overwrite: whether what another recipe has begun may be removed.
        trust: what the files of the model may do.

    Returns:
        The pipeline; nothing is written yet.

    Raises:
        ValueError: in one line that names the fix.
    """
    device_of(recipe)
    groups = _groups(recipe.stages)
    one_walk = len(groups) == 1 and not isinstance(recipe.stages[0], ModelStage)
    if not one_walk and not shared and is_main():
        check_own_folder(output, source)
    model = build_skeleton(source.config, source.dtype, trust=trust)
    walks: list[Walk | None] = []
    state, planned = ModelState(), source
    texts: list[Mapping[str, str]] = []
    for first, stages in groups:
        state = check_order(first, stages[0], state, source, model)
        if isinstance(stages[0], ModelStage):
            _check_parallel(first, stages[0], recipe.tensor_parallel)
            planned = stages[0].planned_source(planned, model)
        walk = None
        if not isinstance(stages[0], ModelStage):
            walk = plan_walk(recipe.model_copy(update={"stages": stages}), planned, first, trust)
            cache = f"stages.{first + len(stages) - 1} ({walk.plan.cache[0].method})" if walk.plan.cache else None
            masking = (f"stages.{i} ({s.method})" for i, s in enumerate(walk.plan.stages, first) if s.prunes)
            state = replace(
                state,
                quantized=state.quantized or bool(walk.plan.schemes),
                pruned=state.pruned or next(masking, None),
                cache=cache,
            )
        walks.append(walk)
        texts.append(state.texts)
    reason = _calibration_reason(groups, walks)
    windows = calibration_ids(recipe, source, reason, trust=trust) if reason else None
    steps: list[Step] = []
    for number, ((first, stages), walk) in enumerate(zip(groups, walks, strict=True), 1):
        last = number == len(groups)
        prefix = recipe.model_copy(update={"stages": recipe.stages[: first + len(stages)]})
        identity = identify(prefix, source, windows) | ({"texts": texts[number - 1]} if texts[number - 1] else {})
        folder = output if last else step_folder(output, number, identity, shared)
        if walk:
            walk, domains = check_texts(walk, source, windows, trust)
            identity |= {"protect": domains} if domains else {}
        _check_folder(folder, identity, last=last, overwrite=overwrite)
        steps.append(Step(first, stages, walk, folder, identity))
    return Pipeline(recipe, source, tuple(steps), windows, output, trust, bool(shared), _extra_tensors(source, model))


def _extra_tensors(source: Source, model: PreTrainedModel) -> str:
    checkpoint = arrange_source(source, model).checkpoint
    names = extra_names(checkpoint, model)
    return describe_extra(checkpoint, names, model) if names else ""


def _calibration_reason(groups: Sequence[tuple[int, tuple[Stage, ...]]], walks: Sequence[Walk | None]) -> str | None:
    """Return what needs calibration text first, for messages; None if nothing does."""
    for (_, stages), walk in zip(groups, walks, strict=True):
        if walk and walk.plan.calibrates:
            return walk.plan.calibration_reason
        if walk is None and stages[0].needs.calibration:
            return stages[0].needs.reason or stages[0].method
    return None


def _check_parallel(number: int, stage: ModelStage, gpus: int) -> None:
    try:
        stage.check_parallel(gpus)
    except ValueError as e:
        raise ValueError(f"stages.{number} ({stage.method}): {e}") from e


def _check_folder(folder: Path, identity: dict[str, Any], *, last: bool, overwrite: bool) -> None:
    """Check that a step may be written to its folder, or is there already."""
    check_identity(folder, identity, overwrite=overwrite)
    present = None if last else read_identity(folder)
    if present not in (None, identity) and not overwrite:
        raise ValueError(
            f"{folder} was made by another recipe (different: {differing_keys(present or {}, identity)}); "
            "finish that, choose another output, or pass --overwrite"
        )


def _groups(stages: Sequence[Stage]) -> list[tuple[int, tuple[Stage, ...]]]:
    """Return the stages that go together, each group with the number of its first."""
    together = groupby(enumerate(stages), key=lambda item: item[0] if isinstance(item[1], ModelStage) else None)
    groups = [list(group) for _, group in together]
    return [(group[0][0], tuple(stage for _, stage in group)) for group in groups]
