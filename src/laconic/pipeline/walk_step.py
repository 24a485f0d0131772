"""One walk of a recipe: planned from shapes alone, then streamed block by block into an artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.artifact.artifact import Artifact
from laconic.artifact.workspace import Workspace
from laconic.checkpoint.extra import extra_linears, extra_names, extra_shards
from laconic.checkpoint.files import KV_CONFIG
from laconic.checkpoint.layout import engine_names
from laconic.checkpoint.materialise import check_complete
from laconic.checkpoint.source import Source, arrange_source, build_skeleton
from laconic.checkpoint.trust import Trust
from laconic.formats.schemes import Scheme
from laconic.formats.storage import scheme_of_shapes
from laconic.kv.attach import fingerprint
from laconic.pipeline.calibration import domain_ids, walk_settings
from laconic.pipeline.engines import quantization_config
from laconic.pipeline.provenance import account, sha256
from laconic.pipeline.untying import untie, unties
from laconic.pipeline.written import check_written
from laconic.recipe import Recipe
from laconic.runtime.quant_config import NATIVE
from laconic.stages.cache import CacheStage
from laconic.structure.anatomy import dissect
from laconic.structure.calls import LOOPED
from laconic.walk.deployment import Deployment
from laconic.walk.forecast import Forecast
from laconic.walk.forecast import forecast as predict
from laconic.walk.plan import Plan, check_experts, make_plan
from laconic.walk.remarks import remarks
from laconic.walk.walk import walk as stream

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Walk:
    """A walk that passed every check.

    Attributes:
        recipe: its stages are those of the walk.
        source: the checkpoint that it reads, arranged as the model's parameters.
        model: a skeleton of it.
        plan: which stage treats which linear, and how each is stored.
        extra: names of tensors that are not part of the text model and are written unchanged.
        domains: token ids of the texts on which stages choose the heads that they protect, by the stage's number.
    """

    recipe: Recipe
    source: Source
    model: PreTrainedModel
    plan: Plan
    extra: Sequence[str] = ()
    domains: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards: one for each block, one for what is outside of them, and those of extra tensors."""
        return len(self.plan.anatomy.taps) + 1 + len(extra_shards(self.source.checkpoint, self.extra))

    def forecast(self, windows: Tensor | None) -> Forecast:
        """Predict the size of the artifact and the peak memory.

        Args:
            windows: calibration token ids (samples, tokens); None without calibration.

        Returns:
            Sizes in bytes, predicted from shapes.
        """
        samples, length = windows.shape if windows is not None and self.plan.calibrates else (0, 0)
        return predict(self.plan, self.source, samples, length, self.extra)

    @property
    def remarks(self) -> list[dict[str, Any]]:
        """Decisions of the plan that no key asked for, as events for the log, each with a `message`."""
        return remarks(self.plan, self.model, self.source.checkpoint)


def plan_walk(recipe: Recipe, source: Source, first: int, trust: Trust) -> Walk:
    """Plan a walk, and check everything that shapes tell.

    Args:
        recipe: its stages are those of the walk.
        source: the checkpoint.
        first: number of the first stage in the whole recipe.
        trust: what the files of the model may do.

    Returns:
        The walk, its `domains` not read yet.

    Raises:
        ValueError: in one line that names the fix.
    """
    model = build_skeleton(source.config, source.dtype, trust=trust)
    source = arrange_source(source, model)
    check_complete(model, source.checkpoint)
    anatomy = dissect(model)
    if unties(recipe.stages, anatomy):
        source = untie(source, anatomy)
        model = build_skeleton(source.config, source.dtype, trust=trust)
        anatomy = dissect(model)
    calibrated = next((s.method for s in recipe.stages if s.needs.calibration), None)
    if anatomy.obstacle == LOOPED and any(isinstance(s, CacheStage) for s in recipe.stages):
        raise ValueError(f"blocks of '{source.config.model_type}' {LOOPED}, which a quantized cache is not for")
    if anatomy.obstacle and calibrated:
        raise ValueError(
            f"blocks of '{source.config.model_type}' {anatomy.obstacle}, so that {calibrated} cannot observe them one "
            "by one; use methods without calibration (rtn)"
        )
    plan = make_plan(model, anatomy, recipe.stages, first, Deployment(recipe.engine, recipe.tensor_parallel))
    check_experts(plan, bool(recipe.calibration and recipe.calibration.moe_calibrate_all_experts))
    return Walk(recipe, source, model, plan, extra_names(source.checkpoint, model))


def check_texts(walk: Walk, source: Source, windows: Tensor | None, trust: Trust) -> tuple[Walk, dict[int, str]]:
    """Check the calibration set against the plan, and read the other texts of the walk.

    Args:
        walk: as planned.
        source: the original checkpoint, whose tokenizer is used.
        windows: calibration token ids (samples, tokens).
        trust: what the files of the model may do.

    Returns:
        The walk with these texts, and their hashes by the stage's number.

    Raises:
        ValueError: if samples are too short, or a text cannot be read.
    """
    plan = walk.plan
    if windows is not None and plan.cache and plan.calibrates_cache:
        plan.cache[0].check_length(plan.cache[1], windows.shape[1])
    domains = domain_ids(walk.recipe, source, plan, trust)
    return replace(walk, domains=domains), {i: sha256(ids) for i, ids in domains.items()}


def run_walk(
    walk: Walk,
    windows: Tensor | None,
    workspace: Workspace,
    *,
    before: Path | None,
    report: Report,
    describe: Callable[[Path], None],
) -> Artifact:
    """Stream a model through a walk, or go on with a walk that was interrupted.

    Args:
        walk: planned on the checkpoint that it reads.
        windows: calibration token ids (samples, tokens), if any stage of the recipe needs them.
        workspace: the folder of the artifact.
        before: the artifact of the step before.
        report: called with events of progress.
        describe: writes the cards into the folder.

    Returns:
        The artifact.

    Raises:
        ValueError: if a stage cannot treat a block, or the activations hold NaN or infinity.
    """
    start = time.monotonic()
    recipe, plan, source = walk.recipe, walk.plan, walk.source
    torch.manual_seed(recipe.seed)
    windows = windows if plan.calibrates else None
    settings = walk_settings(recipe, windows)
    to_config = _to_config(walk)
    resumed = sum(workspace.is_finished(i) for i in range(workspace.shards))
    workspace.write_log(walk.remarks)
    stream(
        source,
        walk.model,
        plan,
        windows,
        workspace=workspace,
        settings=settings,
        report=report,
        extra=extra_shards(source.checkpoint, walk.extra),
        domains=walk.domains,
    )
    schemes = _written_schemes(walk, workspace)
    simulated = any(s.simulated for s in schemes.values())
    facts = account(start, settings.device, recipe.seed, resumed_shards=resumed, simulated=simulated, earlier=before)
    # Saved before the folder gets its name: an artifact is whole from the moment it is there.
    Artifact(workspace.folder).save_result("compress", facts)
    config = _config(walk, workspace, schemes, to_config)
    check_written(workspace, walk.model, schemes, plan.linears, config=config, dtype=source.dtype)
    return Artifact(workspace.finish(config, source.folder, carried=before, describe=describe))


def _to_config(walk: Walk) -> Callable[[Mapping[str, Scheme]], dict[str, Any]]:
    """Return the function that describes schemes in config.json; raise before anything is computed if none can."""
    linears = [*walk.plan.linears, *sorted(walk.plan.anatomy.routers)]
    extra = extra_linears(walk.source.checkpoint, walk.extra)
    return quantization_config(walk.plan.schemes, linears, walk.model, walk.source.checkpoint, extra)


def _config(
    walk: Walk,
    workspace: Workspace,
    schemes: Mapping[str, Scheme],
    to_config: Callable[[Mapping[str, Scheme]], dict[str, Any]],
) -> dict[str, Any]:
    """Return config.json with the quantization of linears and of the cache."""
    config = dict(walk.source.raw)
    cache = walk.plan.cache
    if cache:
        config[KV_CONFIG] = _write_cache(walk, workspace)
    if schemes:
        config["quantization_config"] = to_config(schemes)
    if cache and (engine_scheme := cache[0].engine_scheme):
        quantization = config.get("quantization_config") or to_config({})
        # Native artifacts are read by our plugin, which knows the cache by its own key.
        if quantization["quant_method"] != NATIVE:
            config["quantization_config"] = quantization | {"kv_cache_scheme": engine_scheme}
    return config


def _write_cache(walk: Walk, workspace: Workspace) -> dict[str, Any]:
    """Write the cache's calibrated parameters, and return its scheme for config.json."""
    assert walk.plan.cache is not None
    stage, shape = walk.plan.cache
    if not walk.plan.calibrates_cache:
        return stage.scheme(shape).to_dict()
    scheme, parameters = stage.finish_calibration(shape, workspace.read_calibration(shape.layers))
    if parameters:
        workspace.write_cache(parameters)
    embeddings = walk.model.get_input_embeddings()
    name = next(n for n, m in walk.model.named_modules() if m is embeddings)
    weight = walk.source.checkpoint.load([f"{name}.weight"])[f"{name}.weight"]
    return replace(scheme, fingerprint=fingerprint(weight)).to_dict()


def _written_schemes(walk: Walk, workspace: Workspace) -> dict[str, Scheme]:
    """Return the plan's schemes with the side tensors that the finished shards hold."""
    schemes = walk.plan.schemes
    if not schemes:
        return {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in workspace.read_shapes().items():
        linear, _, leaf = name.rpartition(".")
        shapes.setdefault(linear, {})[leaf] = shape
    names = engine_names(walk.source.checkpoint, walk.model, [*schemes])
    return {n: scheme_of_shapes(s, shapes.get(n) or shapes.get(names[n], {})) for n, s in schemes.items()}
