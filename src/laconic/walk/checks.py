"""Checks of a plan: what cannot work is refused before anything is computed, in one line that names the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel

from laconic.formats.schemes import Scheme
from laconic.runtime.embedding import check_table
from laconic.stages.block import BlockStage
from laconic.stages.linear import LinearStage, WeightStage
from laconic.stages.pruning import Masking, PruningStage
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.targets import matches
from laconic.structure.anatomy import Anatomy, Tap
from laconic.structure.heads import Heads, find_heads
from laconic.structure.links import Link, links_without

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of linears, by full name."""


def check_head(stage: WeightStage, number: int, names: Sequence[str], anatomy: Anatomy) -> None:
    """Check that a stage may treat the head, if it targets it.

    Args:
        stage: the stage.
        number: of the stage in the recipe, for messages.
        names: full names of the linears that it targets.
        anatomy: of the model.

    Raises:
        ValueError: if the head shares its weight, or the stage treats blocks.
    """
    if anatomy.head not in names:
        return
    if anatomy.tied:
        raise ValueError(
            f"stages.{number} targets {anatomy.head}, which shares its weight with the embeddings; put it in ignore, "
            "or give Embedding a stage of rtn, which unties the two"
        )
    if isinstance(stage, BlockStage):
        raise ValueError(
            f"stages.{number} ({stage.method}) works on decoder blocks, and {anatomy.head} is in none; "
            "give it a stage of its own"
        )


def check_embeddings(stage: WeightStage, number: int, anatomy: Anatomy, *, cache: bool) -> None:
    """Check that a stage may treat the input embeddings.

    Args:
        stage: the stage.
        number: of the stage in the recipe, for messages.
        anatomy: of the model.
        cache: whether the recipe has a stage for the key-value cache.

    Raises:
        ValueError: if it may not; the message names the fix.
    """
    name = anatomy.embeddings
    if not isinstance(stage, QuantizingStage) or not isinstance(stage, LinearStage) or stage.needs.second_moments:
        raise ValueError(
            f"stages.{number} ({stage.method}) looks at the inputs of linears, and {name} reads token ids; give "
            "Embedding a stage of rtn"
        )
    if anatomy.tied:
        raise ValueError(
            f"stages.{number} targets {name}, which shares its weight with {anatomy.head}; give {anatomy.head} a stage "
            "too, which unties the two"
        )
    if cache:
        raise ValueError(
            f"stages.{number} targets {name}, by which a quantized cache recognizes its model; leave Embedding out of "
            "targets, or leave the cache's stage out"
        )
    check_table(name, stage.scheme_for((2, 2)))


def check_fits(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Check that a linear can be stored and computed under a scheme.

    Args:
        name: full name of the linear.
        shape: (out, in).
        scheme: the scheme.

    Raises:
        ValueError: if it cannot.
    """
    scheme.weights.check_shape(name, shape)
    if scheme.rank > min(shape):
        raise ValueError(
            f"low_rank {scheme.rank} is more than {min(shape)}, the rank of {name} itself; lower it, or ignore it"
        )
    acts = scheme.input_activations
    size = acts.format.tiling.group_size if acts else None
    if size and shape[1] % size:
        raise ValueError(
            f"{scheme.name} rounds activations in groups of {size}, "
            f"which does not divide the {shape[1]} inputs of {name}; use FP8_DYNAMIC, or ignore it"
        )


def check_unpruned(stage: WeightStage, number: int, name: str, scheme: Scheme, pruned: Mapping[str, str]) -> None:
    """Check that nothing that fills in zeros is done to a pruned linear: no low-rank product, no rotation.

    Args:
        stage: the stage.
        number: of the stage in the recipe, for messages.
        name: full name of the linear.
        scheme: that the stage proposes for it.
        pruned: method that has pruned a linear, by the linear's full name.

    Raises:
        ValueError: if one is.
    """
    if scheme.rank and name in pruned:
        raise ValueError(
            f"stages.{number} ({stage.method}) adds a low_rank product to {name}, which {pruned[name]} has pruned: "
            "none of its zeros would remain; leave low_rank out, or ignore the linear in one of them"
        )
    if scheme.input_rotation and name in pruned:
        raise ValueError(
            f"stages.{number} ({stage.method}) rotates the inputs of {name}, which {pruned[name]} has pruned: none of "
            "its zeros would remain; leave rotate_inputs out, or ignore the linear in one of them"
        )


def check_masks(stage: Masking, number: int, names: Sequence[str], shapes: Shapes, head: str) -> None:
    """Check that a stage can prune its linears.

    Args:
        stage: the stage.
        number: of the stage in the recipe, for messages.
        names: full names of the linears that it targets.
        shapes: of all linears.
        head: full name of the head.

    Raises:
        ValueError: if a mask structure does not divide one, a pattern of `ratios` has no effect, or a stage with an
            allocation targets the head alone.
    """
    for name in names:
        try:
            stage.check_shape(name, shapes[name])
        except ValueError as e:
            raise ValueError(f"stages.{number} ({stage.method}): {e}") from e
    if isinstance(stage, PruningStage):
        _check_ratios(stage, number, names)
        if stage.allocation and all(n == head for n in names):
            raise ValueError(
                f"stages.{number}.allocation looks at linears in blocks, and {head} is in none; leave allocation out"
            )


def _check_ratios(stage: PruningStage, number: int, names: Sequence[str]) -> None:
    for pattern in stage.ratios:
        if not any(matches(name, [pattern]) for name in names):
            leaves = sorted({n.rpartition(".")[2] for n in names})
            near = get_close_matches(pattern.removeprefix("re:").strip(".*$^\\"), leaves, 1, 0.4)
            hint = f"did you mean 're:.*{near[0]}'?" if near else f"they end in {', '.join(leaves)}"
            raise ValueError(f"stages.{number}.ratios '{pattern}' matches none of the linears of this stage; {hint}")
    effective = {next((p for p in stage.ratios if matches(n, [p])), None) for n in names}
    for pattern in (p for p in stage.ratios if p not in effective):
        raise ValueError(
            f"stages.{number}.ratios '{pattern}' never counts, since patterns before it fit all that it fits, and "
            "the first that fits counts; list it before them"
        )


def check_fused(anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> None:
    """Check that linears which engines fuse share a scheme.

    These are the linears of one module that read one input, and all experts of a layer.

    Args:
        anatomy: of the model.
        schemes: by full name.

    Raises:
        ValueError: if two differ.
    """
    for i, taps in enumerate(anatomy.taps):
        block = anatomy.block_name(i)
        fused: dict[Any, list[str]] = {}
        for tap in taps:
            for n in tap.linears:
                fused.setdefault(tap.experts or (tap, n.rpartition(".")[0]), []).append(f"{block}.{n}")
        for key, names in fused.items():
            _check_alike(key, names, schemes)


def _check_alike(key: Any, names: Sequence[str], schemes: Mapping[str, Scheme]) -> None:
    first = {(s := schemes.get(n)) and s.plain: n for n in reversed(names)}
    if len(first) > 1:
        # Of many experts, one linear of each kind is enough for the message.
        shown = [n for n in names if n in first.values()] if isinstance(key, str) else names
        listed = ", ".join(f"{n}: {s.name if (s := schemes.get(n)) else '16 bit'}" for n in shown)
        group = "the experts of a layer" if isinstance(key, str) else "linears that read one input"
        raise ValueError(f"{group} must share a scheme, since engines fuse them ({listed})")


def check_blocks(
    anatomy: Anatomy,
    stages: Sequence[WeightStage],
    targets: Sequence[Set[str]],
    *,
    links: Sequence[Mapping[Tap, Link]],
    shapes: Shapes,
    first: int,
) -> None:
    """Let block stages check every block that they treat.

    Args:
        anatomy: of the model.
        stages: in order.
        targets: of each stage, full names of its linears.
        links: of each block; empty where no stage needs them.
        shapes: of all linears.
        first: number of the first stage in the recipe, for messages.

    Raises:
        ValueError: if one cannot treat a block, which is named.
    """
    quantized: set[str] = set()
    for number, (stage, names) in enumerate(zip(stages, targets, strict=True), first):
        for i, taps in enumerate(anatomy.taps):
            block = anatomy.block_name(i)
            targeted = [t for t in taps if any(f"{block}.{n}" in names for n in t.linears)]
            if isinstance(stage, BlockStage) and targeted:
                codes = {n for t in taps for n in t.linears if f"{block}.{n}" in quantized}
                widths = {t: shapes[f"{block}.{t.linears[0]}"][1] for t in targeted}
                try:
                    stage.check(widths, links_without(links[i], codes) if links else {})
                except ValueError as e:
                    raise ValueError(f"stages.{number} ({stage.method}), {block}: {e}") from e
        quantized |= names if stage.quantizes else frozenset()


def protected_heads(
    model: PreTrainedModel,
    anatomy: Anatomy,
    stages: Sequence[WeightStage],
    targets: Sequence[Set[str]],
    *,
    shapes: Shapes,
    first: int,
) -> tuple[Heads, ...]:
    """Return the attention heads of each block, where a stage protects some; otherwise nothing.

    Args:
        model: a skeleton.
        anatomy: of the model.
        stages: in order.
        targets: of each stage, full names of its linears.
        shapes: of all linears.
        first: number of the first stage in the recipe, for messages.

    Raises:
        ValueError: if the heads are unknown, a mask structure does not divide them, or the stage prunes no linear of
            attention.
    """
    heads: tuple[Heads, ...] = ()
    for number, (stage, names) in enumerate(zip(stages, targets, strict=True), first):
        if not isinstance(stage, PruningStage) or stage.protect is None:
            continue
        try:
            blocks = [(anatomy.block_name(i), taps) for i, taps in enumerate(anatomy.taps)]
            local = [{n: shapes[f"{block}.{n}"] for tap in taps for n in tap.linears} for block, taps in blocks]
            heads = tuple(find_heads(t, linears, model.config) for t, linears in zip(anatomy.taps, local, strict=True))
        except ValueError as e:
            raise ValueError(f"stages.{number}.protect: {e}; leave it out, and ignore linears instead") from e
        attention = {f"{anatomy.block_name(i)}.{n}" for i, h in enumerate(heads) for n in (*h.rows, h.output)}
        if not attention & names:
            raise ValueError(
                f"stages.{number}.protect leaves attention heads whole, and the stage prunes no linear of attention; "
                "leave it out, or widen targets"
            )
        for length in (stage.structure.width, stage.structure.height):
            if heads[0].size % length:
                raise ValueError(
                    f"stages.{number}.protect: mask_structure '{stage.mask_structure}' does not divide a head of "
                    f"{heads[0].size} channels; use another structure, or leave protect out"
                )
    return heads
