"""Which groups may become narrower, and how many units of each stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import build_empty_model
from laconic.methods.llm_pruner.groups import Group, Kind, find_groups
from laconic.methods.llm_pruner.reach import Reach, check_reach
from laconic.methods.llm_pruner.saliency import cut
from laconic.structure.anatomy import Anatomy
from laconic.structure.config_keys import WIDTHS

# What widths of experts are a multiple of: products of all at once, in transformers, take rows of whole 16 bytes.
_EXPERT_STEP = 8

Counts = Mapping[tuple[str, ...], int]
"""How many units stay in every block, of the groups that some keys of the config say."""


@dataclass(frozen=True)
class Targeted:
    """Groups that may become narrower, by block, of the blocks that are not protected."""

    blocks: Mapping[int, Sequence[Group]]

    @property
    def flat(self) -> list[tuple[int, Group]]:
        """Block and group, one after another."""
        return [(i, group) for i, groups in self.blocks.items() for group in groups]


@dataclass(frozen=True)
class Narrowing:
    """What is asked for. sparsity: share of the parameters of the groups of these kinds that goes. uniform: the same
    widths in all blocks. heads: how many query heads stay in a block. multiple_of: of what an MLP's or the hidden width
    is a multiple; by the width when not given. keep_first, keep_last: blocks that stay whole; an eighth and a sixteenth
    of them when not given."""

    sparsity: float
    kinds: Sequence[Kind]
    uniform: bool = False
    heads: int | None = None
    multiple_of: int | None = None
    keep_first: int | None = None
    keep_last: int | None = None

    def target(self, model: PreTrainedModel, anatomy: Anatomy, raw: Mapping[str, Any]) -> tuple[Targeted, Counts]:
        """What may become narrower, and where all blocks are to be alike how many units stay. raw: config.json.

        Raises: ValueError when nothing could be pruned, or not what was asked for.
        """
        targeted = Targeted(self._unprotected(model, anatomy))
        sizes = sizes_of_units(model, anatomy, targeted)
        counts = self._uniform_counts(raw, model.dtype, targeted, sizes) if self.uniform else {}
        fixed = self._fixed(targeted)
        found = []
        for size, (_, group) in zip(sizes, targeted.flat, strict=True):
            if group.kind == "mlp":
                step = self._step(group)
                found.append(replace(self.channels(group.units), size=size, stays=step, step=step))
            else:
                found.append(Reach(size, group.units, fixed or 1, 1, fixed is not None))
        check_reach(self.sparsity, found)
        return targeted, counts

    def kept(
        self, targeted: Targeted, counts: Counts, importance: Sequence[Tensor], sizes: Sequence[int]
    ) -> list[Tensor]:
        """Of each group, which units stay. importance: of the units; sizes: parameters of one."""
        if self.uniform:
            return [_best(v, counts[tuple(g.keys)]) for v, (_, g) in zip(importance, targeted.flat, strict=True)]
        flat, fixed = targeted.flat, self._fixed(targeted)
        total = sum(size * g.units for size, (_, g) in zip(sizes, flat, strict=True))
        target, masks = round(self.sparsity * total), dict[int, Tensor]()
        for n, (size, (_, group)) in enumerate(zip(sizes, flat, strict=True)):
            if group.kind == "attention" and fixed is not None:
                masks[n] = _best(importance[n], fixed)
                target -= size * (group.units - fixed)
        free = [n for n in range(len(flat)) if n not in masks]
        steps = [self._step(flat[n][1]) for n in free]
        found = cut([importance[n] for n in free], [sizes[n] for n in free], steps, max(0, target))
        masks |= dict(zip(free, found, strict=True))
        return [masks[n] for n in range(len(flat))]

    def channels(self, width: int) -> Reach:
        """How far channels can be taken out. Raises: ValueError when they can be no multiple of what they are to be one
        of."""
        if self.multiple_of and self.multiple_of > width:
            raise ValueError(
                f"multiple_of {self.multiple_of} is more than the {width} channels that there are; lower it"
            )
        step = self.channel_step(width)
        return Reach(1, width, step, step)

    def channel_step(self, width: int) -> int:
        """How many channels go at once."""
        # A sixteenth of the width, but a power of two up to 128, so that groups of later codes still fit.
        return self.multiple_of or min(128, 2 ** max(0, int(math.log2(max(1, width / 16)))))

    def _unprotected(self, model: PreTrainedModel, anatomy: Anatomy) -> dict[int, Sequence[Group]]:
        kind, count = model.config.model_type, len(anatomy.taps)
        if model.config.get_text_config() is not model.config:
            raise ValueError(f"'{kind}' is more than a language model; llm_pruner prunes plain ones")
        first = math.ceil(count / 8) if self.keep_first is None else self.keep_first
        last = math.ceil(count / 16) if self.keep_last is None else self.keep_last
        if self.uniform:
            first = last = 0
        if first + last >= count:
            raise ValueError(
                f"keep_first {first} and keep_last {last} protect all {count} blocks; lower them, or set uniform: true"
            )
        groups = find_groups(model, anatomy, self.kinds)
        inside: dict[int, Sequence[Group]] = {i: groups[i] for i in range(first, count - last)}
        for asked in self.kinds:
            if not any(g.kind == asked for own in inside.values() for g in own):
                other = [k for k in self.kinds if k != asked and any(g.kind == k for g in inside[first])]
                fix = f"set groups: [{other[0]}]" if other else "use depth, which drops whole blocks"
                raise ValueError(
                    f"the {asked} of '{kind}' cannot be made narrower: a part of it computes something else, or no "
                    f"config says how wide it is; {fix}"
                )
        experts = any(len(g.parts) > 1 for own in inside.values() for g in own)
        if self.multiple_of and self.multiple_of % _EXPERT_STEP and experts:
            raise ValueError(
                f"multiple_of {self.multiple_of}: transformers multiplies by experts whose width is a multiple of "
                f"{_EXPERT_STEP}; use {math.ceil(self.multiple_of / _EXPERT_STEP) * _EXPERT_STEP}"
            )
        return inside

    def _step(self, group: Group) -> int:
        """How many units go at once."""
        if group.kind == "attention":
            return 1
        step = self.channel_step(group.units)
        return max(_EXPERT_STEP, step) if len(group.parts) > 1 and not self.multiple_of else step

    def _fixed(self, targeted: Targeted) -> int | None:
        """How many key-value heads stay, where it is said how many query heads do.

        Raises: ValueError when these cannot be divided among key-value heads.
        """
        if self.heads is None:
            return None
        group = next(g for _, g in targeted.flat if g.kind == "attention")
        each = group.heads
        if self.heads % each or self.heads > each * group.units:
            near = max(each, min(each * group.units, self.heads // each * each))
            raise ValueError(
                f"heads {self.heads} cannot be divided among key-value heads, {each} to each of {group.units}; "
                f"use {near}"
            )
        return self.heads // each

    def _uniform_counts(
        self, raw: Mapping[str, Any], dtype: torch.dtype, targeted: Targeted, sizes: Sequence[int]
    ) -> Counts:
        """Heads that a stock config cannot do without stay, and the MLP makes up for them."""
        if WIDTHS in raw:
            raise ValueError("the blocks of this model differ in width already, which uniform cannot undo")
        alike: dict[tuple[str, ...], list[Group]] = {}
        totals: dict[tuple[str, ...], int] = {}
        for size, (_, group) in zip(sizes, targeted.flat, strict=True):
            keys = tuple(group.keys)
            alike.setdefault(keys, []).append(group)
            totals[keys] = totals.get(keys, 0) + group.units * size
        if any(g.units != groups[0].units for groups in alike.values() for g in groups):
            raise ValueError("the blocks of this model differ in width; leave out uniform")
        target = self.sparsity * sum(totals.values())
        counts: dict[tuple[str, ...], int] = {}
        for keys, (group, *_) in alike.items():
            if group.kind == "attention":
                counts[keys] = self._uniform_heads(raw, dtype, targeted, group)
                target -= totals[keys] * (1 - counts[keys] / group.units)
        if self.sparsity and all(counts.get(keys) == groups[0].units for keys, groups in alike.items()):
            raise ValueError(
                f"a stock config of '{raw['model_type']}' cannot have fewer heads at this sparsity; leave out "
                "uniform, or add mlp to groups"
            )
        rest = [keys for keys in alike if keys not in counts]
        for keys in rest:
            group = alike[keys][0]
            step, share = self._step(group), target / sum(totals[k] for k in rest)
            counts[keys] = min(group.units, max(step, round(group.units * (1 - share) / step) * step))
        return counts

    def _uniform_heads(self, raw: Mapping[str, Any], dtype: torch.dtype, targeted: Targeted, group: Group) -> int:
        fixed = self._fixed(targeted)
        least = fixed if fixed is not None else max(1, math.ceil(group.units * (1 - self.sparsity)))
        choices = [least] if fixed is not None else range(least, group.units + 1)
        accepted = [n for n in choices if n == group.units or _is_said(raw, group, n, dtype)]
        if not accepted:
            raise ValueError(
                f"a stock config of '{raw['model_type']}' cannot have {self.heads} heads; leave out uniform"
            )
        return accepted[0]


def sizes_of_units(model: PreTrainedModel, anatomy: Anatomy, targeted: Targeted) -> list[int]:
    """Parameters of a unit of each group."""
    return [group.unit_size(model.get_submodule(anatomy.block_name(i))) for i, group in targeted.flat]


def _is_said(raw: Mapping[str, Any], group: Group, kept: int, dtype: torch.dtype) -> bool:
    """Whether a stock config can say that all blocks have so many units."""
    try:
        build_empty_model({**raw, **group.widths(kept)}, dtype)
    except ValueError:
        return False
    return group.stock


def _best(importance: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(importance), dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:count]] = True
    return mask
