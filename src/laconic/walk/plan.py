"""The plan of a walk: which stage treats which linear, and how each linear will be stored.

It is made, and checked, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from laconic.formats.schemes import Scheme
from laconic.kv.rotary import rotary_of
from laconic.kv.shape import KvShape, kv_shape
from laconic.runtime.embedding import check_table
from laconic.solvers.masks import StackedLinear
from laconic.stages.cache import CacheStage, check_cache_is_last
from laconic.stages.linear import WeightStage
from laconic.stages.pruning import Masking
from laconic.stages.quantizing import QuantizingStage, needs_with_schemes
from laconic.stages.stage import Needs, Stage
from laconic.stages.targets import find_targets
from laconic.structure.anatomy import Anatomy, Tap, linears_of
from laconic.structure.heads import Heads
from laconic.structure.links import Link, find_links
from laconic.walk.checks import (
    check_blocks,
    check_embeddings,
    check_fits,
    check_fused,
    check_head,
    check_masks,
    check_unpruned,
    protected_heads,
)
from laconic.walk.deployment import UNDIVIDED, Deployment, check_deployment, deployed_scheme, propose_schemes


@dataclass(frozen=True)
class BlockWork:
    """Work of one stage in one block.

    Attributes:
        stage: the stage.
        schemes: of the linears that it treats, by name within the block; None for dense weights.
        parts: for a stage that prunes, what is removed of them.
        needs: of the stage, and of the schemes of its linears in the whole model.
    """

    stage: WeightStage
    schemes: Mapping[str, Scheme | None]
    parts: Mapping[str, StackedLinear]
    needs: Needs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Assignment of stages to linears, and the scheme in which each linear will be stored.

    `schemes` is the only source of how a linear is stored, side tensors and static activations included: a change of
    it between planning and the walk changes what is observed, what methods get, and what is written.

    Attributes:
        anatomy: of the model.
        stages: in order.
        targets: for each stage the full names of its linears.
        schemes: of every linear that will be quantized, by full name.
        linears: (out, in) of every linear of the model, by full name, and of the embeddings if a stage targets them.
        links: of each block, where a stage needs them.
        cache: the stage of the key-value cache, and the cache's shape.
        parts: for each stage that prunes, what is removed of its linears, by full name; provisional where a survey sets
            it.
        heads: attention heads of each block, where a stage protects some.
        first: number of the first stage in the recipe.
        deployment: how the artifact will be served.
        config: of the text model, for what the deployment allows.
    """

    anatomy: Anatomy
    stages: tuple[WeightStage, ...]
    targets: tuple[frozenset[str], ...]
    schemes: Mapping[str, Scheme]
    linears: Mapping[str, tuple[int, int]]
    links: tuple[Mapping[Tap, Link], ...] = ()
    cache: tuple[CacheStage, KvShape] | None = None
    parts: tuple[Mapping[str, StackedLinear], ...] = ()
    heads: tuple[Heads, ...] = ()
    first: int = 0
    deployment: Deployment = UNDIVIDED
    config: Any = None

    @cached_property
    def needs(self) -> tuple[Needs, ...]:
        """Data that each stage must be given, with what the schemes of its linears need."""
        return tuple(
            needs_with_schemes(stage.needs, {self.schemes[n] for n in names}) if stage.quantizes else stage.needs
            for stage, names in zip(self.stages, self.targets, strict=True)
        )

    @property
    def calibrates(self) -> bool:
        """Whether calibration data must flow through the model."""
        return self.calibrates_cache or any(needs.calibration for needs in self.needs)

    @property
    def surveys(self) -> bool:
        """Whether the whole original model is run before anything is compressed."""
        return any(stage.needs.survey for stage in self.stages)

    @property
    def calibration_reason(self) -> str:
        """First stage, or part of one, that needs calibration data, for messages; requires `calibrates`."""
        for stage, needs in zip(self.stages, self.needs, strict=True):
            if needs.calibration:
                return needs.reason or stage.method
        assert self.cache is not None
        return self.cache[0].method

    @property
    def calibrates_cache(self) -> bool:
        """Whether the attention of each compressed block is captured."""
        return self.cache is not None and self.cache[0].needs.calibration

    @property
    def two_streams(self) -> bool:
        """Whether the original model's activations are needed beside those of the compressed model."""
        return any(stage.needs.cross_moments for stage in self.stages)

    @cached_property
    def original_inputs(self) -> bool:
        """Whether only the original model's activations flow.

        Then the last stage that observes a block advances the stream, before any linear of the block is quantized or
        pruned.
        """
        if self.calibrates_cache or not self.calibrates:
            return False
        if not all(needs.original_activations for needs in self.needs if needs.observation):
            return False
        changed: set[str] = set()
        for stage, names, needs in zip(self.stages, self.targets, self.needs, strict=True):
            blocks = {self._block_of(n) for n in names if n != self.anatomy.head}
            if needs.observation and blocks & changed:
                return False
            changed |= blocks if stage.quantizes or stage.prunes else set()
        return True

    def _block_of(self, name: str) -> str:
        return name.removeprefix(f"{self.anatomy.blocks}.").partition(".")[0]

    def work(self, i: int) -> list[BlockWork]:
        """Return the work of the stages in a block, without stages that treat none of its linears.

        Args:
            i: number of the block.
        """
        prefix = f"{self.anatomy.block_name(i)}."
        present = {n for tap in self.anatomy.taps[i] for n in tap.linears}
        work = []
        for stage, targets, parts, needs in zip(self.stages, self.targets, self.parts, self.needs, strict=True):
            local = {n.removeprefix(prefix): n for n in targets if n.startswith(prefix)}
            names = {n: full for n, full in local.items() if n in present}
            if names:
                schemes = {n: self._scheme(stage, full) for n, full in names.items()}
                local_parts = {n: parts[full] for n, full in names.items() if full in parts}
                work.append(BlockWork(stage, schemes, local_parts, needs))
        return work

    def head_work(self) -> list[BlockWork]:
        """Return what the stages do with the head."""
        head = self.anatomy.head
        return [
            BlockWork(stage, {head: self._scheme(stage, head)}, {head: parts[head]} if head in parts else {}, needs)
            for stage, targets, parts, needs in zip(self.stages, self.targets, self.parts, self.needs, strict=True)
            if head in targets
        ]

    def _scheme(self, stage: WeightStage, name: str) -> Scheme | None:
        return self.schemes[name] if stage.quantizes else None


def make_plan(
    model: PreTrainedModel,
    anatomy: Anatomy,
    stages: Sequence[Stage],
    first: int = 0,
    deployment: Deployment = UNDIVIDED,
) -> Plan:
    """Match the stages' targets with the model's linears, and check that everything can be done.

    Args:
        model: a skeleton.
        anatomy: of the model.
        stages: of one walk.
        first: number of the first of them in the recipe.
        deployment: how the artifact will be served.

    Returns:
        The plan, with the schemes that the stages propose.

    Raises:
        ValueError: if a target matches nothing, a group size does not divide, a linear would be quantized twice,
            linears that engines fuse would differ, a tied head is targeted, the model cannot have such a cache, or
            it cannot be split over the GPUs.
    """
    weight_stages, cache = _separate_cache(model, stages, first)
    targets, schemes, shapes = _match(
        model, anatomy, weight_stages, first=first, deployment=deployment, has_cache=cache is not None
    )
    check_fused(anatomy, schemes)
    config = model.config.get_text_config()
    check_deployment(deployment, config, anatomy, schemes, shapes)
    if cache and deployment.tensor_parallel > 1 and cache[0].engine_scheme is None:
        raise ValueError(
            f"stages.{first + len(stages) - 1} ({cache[0].method}) is served on one GPU alone; leave it out, or set "
            "tensor_parallel: 1"
        )
    if anatomy.head in schemes:
        schemes[anatomy.head] = schemes.pop(anatomy.head)
    links = find_links(model, anatomy) if any(s.needs.links for s in weight_stages) else ()
    check_blocks(anatomy, weight_stages, targets, links=links, shapes=shapes, first=first)
    parts = tuple(_parts(s, names, shapes) for s, names in zip(weight_stages, targets, strict=True))
    heads = protected_heads(model, anatomy, weight_stages, targets, shapes=shapes, first=first)
    return Plan(
        anatomy=anatomy,
        stages=weight_stages,
        targets=targets,
        schemes=schemes,
        linears=shapes,
        links=links,
        cache=cache,
        parts=parts,
        heads=heads,
        first=first,
        deployment=deployment,
        config=config,
    )


def _match(
    model: PreTrainedModel,
    anatomy: Anatomy,
    stages: Sequence[WeightStage],
    *,
    first: int,
    deployment: Deployment,
    has_cache: bool,
) -> tuple[tuple[frozenset[str], ...], dict[str, Scheme], dict[str, tuple[int, int]]]:
    """Return the targets of each stage, the proposed schemes, and the shapes of linears and targeted embeddings."""
    shapes = {n: (m.out_features, m.in_features) for n, m in linears_of(model).items()}
    inside = [n for n in shapes if n.startswith(f"{anatomy.blocks}.") and n not in anatomy.routers | anatomy.bare]
    targets: list[frozenset[str]] = []
    schemes: dict[str, Scheme] = {}
    pruned: dict[str, str] = {}
    for number, stage in enumerate(stages, first):
        names = find_targets(
            stage.targets,
            stage.ignore,
            shapes=shapes,
            inside=inside,
            head=anatomy.head,
            embeddings=anatomy.embeddings,
            stage=f"stages.{number}",
        )
        check_head(stage, number, names, anatomy)
        if anatomy.embeddings in names:
            check_embeddings(stage, number, anatomy, cache=has_cache)
            rows, columns = model.get_parameter(f"{anatomy.embeddings}.weight").shape
            shapes[anatomy.embeddings] = (rows, columns)
        if isinstance(stage, QuantizingStage):
            proposed = propose_schemes(stage, names, anatomy=anatomy, shapes=shapes, deployment=deployment)
            _check_proposed(stage, number, proposed, schemes=schemes, shapes=shapes, pruned=pruned)
            schemes |= proposed
        else:
            # Codes stay as they are: a stage that changes weights treats the linears that are not quantized.
            names = [n for n in names if n not in schemes]
            if not names:
                raise ValueError(
                    f"stages.{number} ({stage.method}) changes weights, and earlier stages have quantized all that it "
                    "targets; list it before them, or leave it out"
                )
        if isinstance(stage, Masking) and stage.prunes:
            check_masks(stage, number, names, shapes, anatomy.head)
            pruned |= dict.fromkeys(names, stage.method)
        targets.append(frozenset(names))
    return tuple(targets), schemes, shapes


def _check_proposed(
    stage: QuantizingStage,
    number: int,
    proposed: Mapping[str, Scheme],
    *,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    pruned: Mapping[str, str],
) -> None:
    """Check the schemes of one stage. schemes: of earlier stages. pruned: the method that pruned each linear."""
    for name, scheme in proposed.items():
        if name in schemes:
            raise ValueError(
                f"stages.{number} ({stage.method}) would quantize {name} a second time; "
                "narrow its targets, or add the linear to the ignore of one stage"
            )
        check_fits(name, shapes[name], scheme)
        check_unpruned(stage, number, name, scheme, pruned)


def _parts(
    stage: WeightStage, names: frozenset[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, StackedLinear]:
    if not isinstance(stage, Masking) or not stage.prunes:
        return {}
    return {n: StackedLinear(slice(0, shapes[n][0]), stage.share_of(n)) for n in sorted(names)}


def _separate_cache(
    model: PreTrainedModel, stages: Sequence[Stage], first: int
) -> tuple[tuple[WeightStage, ...], tuple[CacheStage, KvShape] | None]:
    """Return the stages that treat weights, and the stage of the cache, which comes after them."""
    weights = tuple(s for s in stages if isinstance(s, WeightStage))
    caches = [s for s in stages if isinstance(s, CacheStage)]
    if not caches:
        return weights, None
    number = first + len(stages) - 1
    check_cache_is_last(stages)
    try:
        shape = kv_shape(model.config)
        caches[0].scheme(shape)
        if caches[0].pre_rope:
            rotary_of(model)
    except ValueError as e:
        raise ValueError(f"stages.{number} ({caches[0].method}): {e}") from e
    return weights, (caches[0], shape)


def with_schemes(plan: Plan, schemes: Mapping[str, Scheme]) -> Plan:
    """Return the plan with other schemes for some linears, as bit allocation chooses them.

    Args:
        plan: as the stages proposed it.
        schemes: by full name; all of them must be quantized in the plan.

    Raises:
        ValueError: if a linear cannot have its scheme, linears that engines fuse would differ, or engines cannot split
            the model over its GPUs.
    """
    unknown = schemes.keys() - plan.schemes.keys()
    if unknown:
        raise ValueError(f"no stage quantizes {min(unknown)}; give a stage targets that include it")
    schemes = {n: deployed_scheme(s, plan.deployment) for n, s in schemes.items()}
    pruned: dict[str, str] = {}
    for number, (stage, names) in enumerate(zip(plan.stages, plan.targets, strict=True), plan.first):
        if isinstance(stage, QuantizingStage):
            for name in sorted(names & schemes.keys()):
                stage.check_scheme(schemes[name])
                check_fits(name, plan.linears[name], schemes[name])
                if name == plan.anatomy.embeddings:
                    check_table(name, schemes[name])
                check_unpruned(stage, number, name, schemes[name], pruned)
        if isinstance(stage, Masking) and stage.prunes:
            pruned |= dict.fromkeys(names, stage.method)
    merged = {n: schemes.get(n, s) for n, s in plan.schemes.items()}
    check_fused(plan.anatomy, merged)
    check_deployment(plan.deployment, plan.config, plan.anatomy, merged, plan.linears)
    return replace(plan, schemes=merged)


def check_experts(plan: Plan, all_experts: bool) -> None:
    """Check that no stage compares an expert's inputs with the original model's, where other tokens are routed to it.

    Args:
        plan: the plan.
        all_experts: whether experts are observed on every token.

    Raises:
        ValueError: if a stage does.
    """
    for number, (stage, names) in enumerate(zip(plan.stages, plan.targets, strict=True), plan.first):
        for i, taps in enumerate(plan.anatomy.taps):
            block = plan.anatomy.block_name(i)
            targets_experts = any(f"{block}.{n}" in names for tap in taps if tap.experts for n in tap.linears)
            if stage.needs.cross_moments and targets_experts and not all_experts:
                raise ValueError(
                    f"stages.{number} ({stage.method}) compares inputs with those in the original model, where experts "
                    "read other tokens; set calibration.moe_calibrate_all_experts, or give experts another stage"
                )
