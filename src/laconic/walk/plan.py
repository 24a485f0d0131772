"""What will happen to which linear, decided and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from laconic.formats.fp4 import Fp4
from laconic.formats.schemes import Scheme
from laconic.formats.tiling import groups_for
from laconic.kv.rotary import rotary_of
from laconic.kv.shape import KvShape, kv_shape
from laconic.solvers.masks import StackedLinear
from laconic.stages.cache import CacheStage
from laconic.stages.pruning import Masking, PruningStage
from laconic.stages.stage import BlockStage, Stage
from laconic.stages.targets import find_targets, matches
from laconic.structure.anatomy import Anatomy, Tap, linears_of
from laconic.structure.heads import Heads, find_heads
from laconic.structure.links import Link, find_links, links_without


@dataclass(frozen=True)
class Plan:
    """stages: in order. touched: for each stage the full names of its linears. schemes: of every linear that will be
    quantized, by full name. linears: shape of every linear of the model, by full name. links: of each block, where a
    stage needs them. cache: how the key-value cache is stored, and its shape, if a stage says so. shares: for each
    stage that prunes, what goes of its linears, by full name; provisional where it is found on the original model.
    heads: of each block, where a stage protects some. first: the number of the first stage in the recipe."""

    anatomy: Anatomy
    stages: tuple[Stage, ...]
    touched: tuple[frozenset[str], ...]
    schemes: Mapping[str, Scheme]
    linears: Mapping[str, tuple[int, int]]
    links: tuple[Mapping[Tap, Link], ...] = ()
    cache: tuple[CacheStage, KvShape] | None = None
    shares: tuple[Mapping[str, StackedLinear], ...] = ()
    heads: tuple[Heads, ...] = ()
    first: int = 0

    @property
    def observing(self) -> bool:
        """Whether calibration data must flow through the model."""
        return self.calibrates_cache or self.surveys or any(stage.observes for stage in self.stages)

    @property
    def surveys(self) -> bool:
        """Whether the original model is looked at from end to end before anything is compressed."""
        return any(stage.surveys for stage in self.stages)

    @property
    def needing(self) -> str:
        """What needs calibration data, where anything does."""
        cache = [self.cache[0].method] if self.cache and self.calibrates_cache else []
        return next(iter([*(s.needing for s in self.stages if s.observes or s.surveys), *cache]))

    @property
    def calibrates_cache(self) -> bool:
        """Whether the attention of each compressed block is looked into."""
        return self.cache is not None and self.cache[0].observes

    @cached_property
    def original_inputs(self) -> bool:
        """Whether only the original model's activations are looked at, so that they alone flow: the last stage to look
        at a block passes them on, before any linear of it is quantized or pruned."""
        if self.calibrates_cache or not self.observing:
            return False
        if not all(stage.original_inputs for stage in self.stages if stage.observes):
            return False
        quantized: set[str] = set()
        for stage, names in zip(self.stages, self.touched, strict=True):
            blocks = {self._block_of(n) for n in names if n != self.anatomy.head}
            if stage.observes and blocks & quantized:
                return False
            quantized |= blocks if stage.result or stage.prunes else set()
        return True

    def _block_of(self, name: str) -> str:
        return name.removeprefix(f"{self.anatomy.blocks}.").partition(".")[0]

    @property
    def two_streams(self) -> bool:
        """Whether the original model's activations are needed beside the compressed one's."""
        return any(stage.cross for stage in self.stages)


def make_plan(model: PreTrainedModel, anatomy: Anatomy, stages: Sequence[Stage | CacheStage], first: int = 0) -> Plan:
    """Match the stages' targets with the model's linears. first: the number of the first of them in the recipe.

    Raises: ValueError when a target matches nothing, a group size does not divide, a linear would be quantized
    twice, linears that engines fuse would differ, a tied head is targeted, or the model cannot have such a cache.
    """
    stages, cache = _cache_apart(model, stages, first)
    shapes = {n: (m.out_features, m.in_features) for n, m in linears_of(model).items()}
    inside = [n for n in shapes if n.startswith(f"{anatomy.blocks}.") and n not in anatomy.routers]
    touched, schemes, pruned = [], dict[str, Scheme](), dict[str, str]()
    for number, stage in enumerate(stages, first):
        names = find_targets(stage.targets, stage.ignore, shapes, inside, anatomy.head, f"stages.{number}")
        if anatomy.head in names and anatomy.tied:
            raise ValueError(
                f"stages.{number} targets {anatomy.head}, which shares its weight with the embeddings; put it in ignore"
            )
        if anatomy.head in names and isinstance(stage, BlockStage):
            raise ValueError(
                f"stages.{number} ({stage.method}) works on decoder blocks, and {anatomy.head} is in none; "
                "give it a stage of its own"
            )
        if stage.result:
            for name in names:
                if name in schemes:
                    raise ValueError(
                        f"stages.{number} ({stage.method}) would quantize {name} a second time; "
                        "narrow its targets, or add the linear to the ignore of one stage"
                    )
                kept = stage.result_for(shapes[name])
                assert kept is not None
                _check_fits(name, shapes[name], kept)
                if kept.rank and name in pruned:
                    raise ValueError(
                        f"stages.{number} ({stage.method}) adds a low_rank product to {name}, which {pruned[name]} has "
                        "pruned: nothing of it would stay zero; leave low_rank out, or ignore the linear in one of them"
                    )
                schemes[name] = kept
        else:
            # Codes stay as they are: a stage that only moves or changes weights means the others.
            names = [n for n in names if n not in schemes]
            if not names:
                raise ValueError(
                    f"stages.{number} ({stage.method}) changes weights, and earlier stages have quantized all that it "
                    "targets; list it before them, or leave it out"
                )
        if isinstance(stage, Masking) and stage.prunes:
            _check_masks(stage, number, names, shapes, anatomy.head)
            pruned |= dict.fromkeys(names, stage.method)
        touched.append(frozenset(names))
    for i, taps in enumerate(anatomy.taps):
        _check_alike(anatomy.block_name(i), taps, schemes)
    if anatomy.head in schemes:
        schemes = {n: s for n, s in schemes.items() if n != anatomy.head} | {anatomy.head: schemes[anatomy.head]}
    links = find_links(model, anatomy) if any(isinstance(s, BlockStage) and s.links for s in stages) else ()
    _check_blocks(anatomy, stages, touched, links, shapes, first)
    shares = tuple(_shares(s, names, shapes) for s, names in zip(stages, touched, strict=True))
    heads = _heads(model, anatomy, stages, touched, shapes, first)
    return Plan(anatomy, tuple(stages), tuple(touched), schemes, shapes, links, cache, shares, heads, first)


def _check_masks(
    stage: Masking, number: int, names: Sequence[str], shapes: Mapping[str, tuple[int, int]], head: str
) -> None:
    """Raises: ValueError when a stage cannot prune these linears as it says."""
    for name in names:
        try:
            stage.check_shape(name, shapes[name])
        except ValueError as e:
            raise ValueError(f"stages.{number} ({stage.method}): {e}") from e
    for pattern in stage.ratios if isinstance(stage, PruningStage) else ():
        if not any(matches(name, [pattern]) for name in names):
            leaves = sorted({n.rpartition(".")[2] for n in names})
            near = get_close_matches(pattern.removeprefix("re:").strip(".*$^\\"), leaves, 1, 0.4)
            hint = f"did you mean 're:.*{near[0]}'?" if near else f"they end in {', '.join(leaves)}"
            raise ValueError(f"stages.{number}.ratios '{pattern}' matches none of the linears of this stage; {hint}")
    if isinstance(stage, PruningStage):
        counted = {next((p for p in stage.ratios if matches(n, [p])), None) for n in names}
        for pattern in (p for p in stage.ratios if p not in counted):
            raise ValueError(
                f"stages.{number}.ratios '{pattern}' never counts, since patterns before it fit all that it fits, and "
                "the first that fits counts; list it before them"
            )
        if stage.allocation and all(n == head for n in names):
            raise ValueError(
                f"stages.{number}.allocation looks at linears in blocks, and {head} is in none; leave allocation out"
            )


def _heads(
    model: PreTrainedModel,
    anatomy: Anatomy,
    stages: Sequence[Stage],
    touched: Sequence[Set[str]],
    shapes: Mapping[str, tuple[int, int]],
    first: int,
) -> tuple[Heads, ...]:
    """Of each block, where a stage protects some. Raises: ValueError where they cannot be told apart, or do not consist
    of what goes together."""
    found: tuple[Heads, ...] = ()
    for number, (stage, names) in enumerate(zip(stages, touched, strict=True), first):
        if not isinstance(stage, PruningStage) or stage.protect is None:
            continue
        try:
            blocks = [(anatomy.block_name(i), taps) for i, taps in enumerate(anatomy.taps)]
            local = [{n: shapes[f"{block}.{n}"] for tap in taps for n in tap.linears} for block, taps in blocks]
            found = tuple(find_heads(t, own, model.config) for t, own in zip(anatomy.taps, local, strict=True))
        except ValueError as e:
            raise ValueError(f"stages.{number}.protect: {e}; leave it out, and ignore linears instead") from e
        held = {f"{anatomy.block_name(i)}.{n}" for i, own in enumerate(found) for n in (*own.rows, own.output)}
        if not held & names:
            raise ValueError(
                f"stages.{number}.protect leaves attention heads whole, and the stage prunes no linear of attention; "
                "leave it out, or widen targets"
            )
        for length in (stage.structure.width, stage.structure.height):
            if found[0].size % length:
                raise ValueError(
                    f"stages.{number}.protect: mask_structure '{stage.mask_structure}' does not divide a head of "
                    f"{found[0].size} channels; use another structure, or leave protect out"
                )
    return found


def _shares(stage: Stage, names: Set[str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, StackedLinear]:
    if not isinstance(stage, Masking) or not stage.prunes:
        return {}
    return {n: StackedLinear(slice(0, shapes[n][0]), stage.share_of(n)) for n in sorted(names)}


def _cache_apart(
    model: PreTrainedModel, stages: Sequence[Stage | CacheStage], first: int
) -> tuple[list[Stage], tuple[CacheStage, KvShape] | None]:
    """The stages that change weights, and the one that says how the cache is stored, which comes after them."""
    weights = [s for s in stages if isinstance(s, Stage)]
    caches = [s for s in stages if isinstance(s, CacheStage)]
    if not caches:
        return weights, None
    number = first + len(stages) - 1
    if len(caches) > 1 or not isinstance(stages[-1], CacheStage):
        raise ValueError(
            f"a recipe has one stage for the cache, and it comes last, since it looks at the compressed model; "
            f"these are {', '.join(s.method for s in stages)}"
        )
    try:
        shape = kv_shape(model.config)
        caches[0].scheme(shape)
        if caches[0].pre_rope:
            rotary_of(model)
    except ValueError as e:
        raise ValueError(f"stages.{number} ({caches[0].method}): {e}") from e
    return weights, (caches[0], shape)


def _check_blocks(
    anatomy: Anatomy,
    stages: Sequence[Stage],
    touched: Sequence[frozenset[str]],
    links: Sequence[Mapping[Tap, Link]],
    shapes: Mapping[str, tuple[int, int]],
    first: int,
) -> None:
    """Let block stages say what they cannot do, naming the block."""
    quantized: set[str] = set()
    for number, (stage, names) in enumerate(zip(stages, touched, strict=True), first):
        for i, taps in enumerate(anatomy.taps):
            block = anatomy.block_name(i)
            meant = [t for t in taps if any(f"{block}.{n}" in names for n in t.linears)]
            if isinstance(stage, BlockStage) and meant:
                codes = {n for t in taps for n in t.linears if f"{block}.{n}" in quantized}
                widths = {t: shapes[f"{block}.{t.linears[0]}"][1] for t in meant}
                try:
                    stage.check(widths, links_without(links[i], codes) if links else {})
                except ValueError as e:
                    raise ValueError(f"stages.{number} ({stage.method}), {block}: {e}") from e
        quantized |= names if stage.result else frozenset()


def _check_fits(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    size = scheme.weights.tiling.group_size
    if size and shape[1] % size:
        if isinstance(scheme.weights, Fp4):
            raise ValueError(
                f"{scheme.name} is groups of {size}, which do not divide the {shape[1]} inputs of {name}; "
                "use another scheme there, or ignore it"
            )
        choices = groups_for(shape[1])
        raise ValueError(
            f"group_size {size} does not divide the {shape[1]} inputs of {name}; use {choices}, or ignore it"
        )
    if scheme.rank > min(shape):
        raise ValueError(
            f"low_rank {scheme.rank} is more than {min(shape)}, the rank of {name} itself; lower it, or ignore it"
        )
    acts = scheme.input_activations
    if acts and acts.format.tiling.group_size and shape[1] % acts.format.tiling.group_size:
        raise ValueError(
            f"{scheme.name} rounds activations in groups of {acts.format.tiling.group_size}, "
            f"which does not divide the {shape[1]} inputs of {name}; use FP8_DYNAMIC, or ignore it"
        )


def check_experts(plan: Plan, all_experts: bool) -> None:
    """Raises: ValueError for a stage that compares an expert's inputs with the original model's, which routes other
    tokens to it."""
    for number, (stage, names) in enumerate(zip(plan.stages, plan.touched, strict=True), plan.first):
        for i, taps in enumerate(plan.anatomy.taps):
            block = plan.anatomy.block_name(i)
            hit = any(f"{block}.{n}" in names for tap in taps if tap.experts for n in tap.linears)
            if stage.cross and hit and not all_experts:
                raise ValueError(
                    f"stages.{number} ({stage.method}) compares inputs with those in the original model, where experts "
                    "read other tokens; set calibration.moe_calibrate_all_experts, or give experts another stage"
                )


def _check_alike(block: str, taps: Sequence[Tap], schemes: Mapping[str, Scheme]) -> None:
    """Engines fuse linears of one module that read one input, and all experts of a layer; what is fused has one
    scheme."""
    fused: dict[Any, list[str]] = {}
    for tap in taps:
        for n in tap.linears:
            fused.setdefault(tap.experts or (tap, n.rpartition(".")[0]), []).append(f"{block}.{n}")
    for key, names in fused.items():
        first = {alike(schemes.get(n)): n for n in reversed(names)}
        if len(first) > 1:
            # Of many experts, one linear of each kind tells enough.
            shown = [n for n in names if n in first.values()] if isinstance(key, str) else names
            told = ", ".join(f"{n}: {s.name if (s := schemes.get(n)) else '16 bit'}" for n in shown)
            what = "the experts of a layer" if isinstance(key, str) else "linears that read one input"
            raise ValueError(f"{what} must share a scheme, since engines fuse them ({told})")


def alike(scheme: Scheme | None) -> Scheme | None:
    """A scheme but for what is kept beside the codes: how many columns that is hangs on a linear's width."""
    return scheme and replace(scheme, outlier_columns=0, rank=0)
