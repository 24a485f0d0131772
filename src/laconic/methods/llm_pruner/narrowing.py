"""Groups of a model that may be pruned, and the number of units of each that remain."""

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
from laconic.methods.llm_pruner.limits import GroupLimits, check_sparsity
from laconic.methods.llm_pruner.saliency import choose_units
from laconic.structure.anatomy import Anatomy
from laconic.structure.config_keys import WIDTHS

# Widths of experts are a multiple of this: grouped matrix products in transformers need rows of whole 16 bytes.
_EXPERT_STEP = 8

UnitCounts = Mapping[tuple[str, ...], int]
"""Number of units that remain in every block, by the config keys of the group; for `uniform`."""


@dataclass(frozen=True)
class TargetGroups:
    """Groups that may be pruned.

    Attributes:
        blocks: Groups of each block that is not protected, by number of the block.
    """

    blocks: Mapping[int, Sequence[Group]]

    @property
    def flat(self) -> list[tuple[int, Group]]:
        """All groups, each with the number of its block."""
        return [(i, group) for i, groups in self.blocks.items() for group in groups]


@dataclass(frozen=True)
class Narrowing:
    """Requested widths of a model.

    Attributes:
        sparsity: Share of the parameters of the groups to remove.
        kinds: Kinds of groups to prune.
        uniform: Whether all blocks get the same widths.
        heads: Number of query heads that remain in every block; None chooses by importance.
        multiple_of: Widths of MLPs, or the hidden size, are multiples of it; None chooses it by the width.
        keep_first: Number of first blocks that are not pruned; None for an eighth of them.
        keep_last: Number of last blocks that are not pruned; None for a sixteenth of them.
    """

    sparsity: float
    kinds: Sequence[Kind]
    uniform: bool = False
    heads: int | None = None
    multiple_of: int | None = None
    keep_first: int | None = None
    keep_last: int | None = None

    def find_targets(
        self, model: PreTrainedModel, anatomy: Anatomy, raw: Mapping[str, Any]
    ) -> tuple[TargetGroups, UnitCounts]:
        """Find the groups to prune, and check that the request can be met.

        Args:
            model: The model; its parameters may be on the meta device.
            anatomy: Its blocks and taps.
            raw: Contents of config.json.

        Returns:
            The groups, and with `uniform` the number of units that remain of each kind.

        Raises:
            ValueError: Nothing can be pruned, or not as requested.
        """
        targets = TargetGroups(self._unprotected(model, anatomy))
        sizes = unit_sizes(model, anatomy, targets)
        counts = self._uniform_counts(raw, model.dtype, targets, sizes) if self.uniform else {}
        fixed = self._fixed_kv_heads(targets)
        limits = []
        for size, (_, group) in zip(sizes, targets.flat, strict=True):
            if group.kind == "mlp":
                step = self._step(group)
                limits.append(replace(self.channel_limits(group.units), unit_size=size, min_units=step, step=step))
            else:
                limits.append(GroupLimits(size, group.units, fixed or 1, 1, fixed is not None))
        check_sparsity(self.sparsity, limits)
        return targets, counts

    def choose_units(
        self, targets: TargetGroups, counts: UnitCounts, importance: Sequence[Tensor], sizes: Sequence[int]
    ) -> list[Tensor]:
        """Choose the units of each group that remain.

        Args:
            targets: The groups.
            counts: With `uniform`, the number of units that remain of each kind.
            importance: (units,) of each group.
            sizes: Parameters of a unit of each group.

        Returns:
            (units,) bool of each group, True for units that remain.
        """
        if self.uniform:
            return [_top(v, counts[tuple(g.keys)]) for v, (_, g) in zip(importance, targets.flat, strict=True)]
        flat, fixed = targets.flat, self._fixed_kv_heads(targets)
        total = sum(size * g.units for size, (_, g) in zip(sizes, flat, strict=True))
        target, masks = round(self.sparsity * total), dict[int, Tensor]()
        for n, (size, (_, group)) in enumerate(zip(sizes, flat, strict=True)):
            if group.kind == "attention" and fixed is not None:
                masks[n] = _top(importance[n], fixed)
                target -= size * (group.units - fixed)
        free = [n for n in range(len(flat)) if n not in masks]
        steps = [self._step(flat[n][1]) for n in free]
        chosen = choose_units([importance[n] for n in free], [sizes[n] for n in free], steps, max(0, target))
        masks |= dict(zip(free, chosen, strict=True))
        return [masks[n] for n in range(len(flat))]

    def channel_limits(self, width: int) -> GroupLimits:
        """Return the limits of a group of channels with one parameter per unit.

        Args:
            width: Number of channels.

        Raises:
            ValueError: `multiple_of` is larger than the width.
        """
        if self.multiple_of and self.multiple_of > width:
            raise ValueError(
                f"multiple_of {self.multiple_of} is more than the {width} channels that there are; lower it"
            )
        step = self.channel_step(width)
        return GroupLimits(1, width, step, step)

    def channel_step(self, width: int) -> int:
        """Return the number of channels removed at once.

        Args:
            width: Number of channels.
        """
        # About a sixteenth of the width, as a power of two up to 128, so that quantization groups still divide it.
        return self.multiple_of or min(128, 2 ** max(0, int(math.log2(max(1, width / 16)))))

    def _unprotected(self, model: PreTrainedModel, anatomy: Anatomy) -> dict[int, Sequence[Group]]:
        """Find the groups of all blocks but the first and last ones that are kept."""
        """Find the groups of all blocks but the first and last ones that are kept."""
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
        targets: dict[int, Sequence[Group]] = {i: groups[i] for i in range(first, count - last)}
        for requested in self.kinds:
            if not any(g.kind == requested for block_groups in targets.values() for g in block_groups):
                other = [k for k in self.kinds if k != requested and any(g.kind == k for g in targets[first])]
                fix = f"set groups: [{other[0]}]" if other else "use depth, which drops whole blocks"
                raise ValueError(
                    f"the {requested} of '{kind}' cannot be made narrower: a part of it computes something else, or no "
                    f"config key sets its width; {fix}"
                )
        experts = any(len(g.by_module) > 1 for block_groups in targets.values() for g in block_groups)
        if self.multiple_of and self.multiple_of % _EXPERT_STEP and experts:
            raise ValueError(
                f"multiple_of {self.multiple_of}: transformers multiplies by experts whose width is a multiple of "
                f"{_EXPERT_STEP}; use {math.ceil(self.multiple_of / _EXPERT_STEP) * _EXPERT_STEP}"
            )
        return targets

    def _step(self, group: Group) -> int:
        """Return the number of units removed at once."""
        if group.kind == "attention":
            return 1
        step = self.channel_step(group.units)
        return max(_EXPERT_STEP, step) if len(group.by_module) > 1 and not self.multiple_of else step

    def _fixed_kv_heads(self, targets: TargetGroups) -> int | None:
        """Return the number of attention units that remain, if the number of query heads is requested.

        Raises:
            ValueError: The query heads cannot be divided among key-value heads.
        """
        if self.heads is None:
            return None
        group = next(g for _, g in targets.flat if g.kind == "attention")
        shared = group.heads
        if self.heads % shared or self.heads > shared * group.units:
            nearest = max(shared, min(shared * group.units, self.heads // shared * shared))
            raise ValueError(
                f"heads {self.heads} cannot be divided among key-value heads, {shared} to each of {group.units}; "
                f"use {nearest}"
            )
        return self.heads // shared

    def _uniform_counts(
        self, raw: Mapping[str, Any], dtype: torch.dtype, targets: TargetGroups, sizes: Sequence[int]
    ) -> UnitCounts:
        """Choose equal widths for all blocks: as many heads as a stock config supports, and the rest from the MLP."""
        if WIDTHS in raw:
            raise ValueError("the blocks of this model differ in width already, which uniform cannot undo")
        by_keys: dict[tuple[str, ...], list[Group]] = {}
        totals: dict[tuple[str, ...], int] = {}
        for size, (_, group) in zip(sizes, targets.flat, strict=True):
            keys = tuple(group.keys)
            by_keys.setdefault(keys, []).append(group)
            totals[keys] = totals.get(keys, 0) + group.units * size
        if any(g.units != groups[0].units for groups in by_keys.values() for g in groups):
            raise ValueError("the blocks of this model differ in width; leave out uniform")
        target = self.sparsity * sum(totals.values())
        counts: dict[tuple[str, ...], int] = {}
        for keys, (group, *_) in by_keys.items():
            if group.kind == "attention":
                counts[keys] = self._uniform_heads(raw, dtype, targets, group)
                target -= totals[keys] * (1 - counts[keys] / group.units)
        if self.sparsity and all(counts.get(keys) == groups[0].units for keys, groups in by_keys.items()):
            raise ValueError(
                f"a stock config of '{raw['model_type']}' cannot have fewer heads at this sparsity; leave out "
                "uniform, or add mlp to groups"
            )
        rest = [keys for keys in by_keys if keys not in counts]
        for keys in rest:
            group = by_keys[keys][0]
            step, share = self._step(group), target / sum(totals[k] for k in rest)
            counts[keys] = min(group.units, max(step, round(group.units * (1 - share) / step) * step))
        return counts

    def _uniform_heads(self, raw: Mapping[str, Any], dtype: torch.dtype, targets: TargetGroups, group: Group) -> int:
        """Choose the smallest number of attention units that a stock config supports at this sparsity."""
        fixed = self._fixed_kv_heads(targets)
        smallest = fixed if fixed is not None else max(1, math.ceil(group.units * (1 - self.sparsity)))
        choices = [smallest] if fixed is not None else range(smallest, group.units + 1)
        accepted = [n for n in choices if n == group.units or _stock_config_supports(raw, group, n, dtype)]
        if not accepted:
            raise ValueError(
                f"a stock config of '{raw['model_type']}' cannot have {self.heads} heads; leave out uniform"
            )
        return accepted[0]


def unit_sizes(model: PreTrainedModel, anatomy: Anatomy, targets: TargetGroups) -> list[int]:
    """Count the parameters of a unit of each group.

    Args:
        model: The model; its parameters may be on the meta device.
        anatomy: Its blocks and taps.
        targets: The groups.

    Returns:
        Number of weights of a unit, for each group of `targets.flat`.
    """
    return [group.unit_size(model.get_submodule(anatomy.block_name(i))) for i, group in targets.flat]


def _stock_config_supports(raw: Mapping[str, Any], group: Group, units: int, dtype: torch.dtype) -> bool:
    """Return whether transformers builds a stock model with this number of units in all blocks."""
    try:
        build_empty_model({**raw, **group.widths(units)}, dtype)
    except ValueError:
        return False
    return group.fits_stock_config


def _top(importance: Tensor, count: int) -> Tensor:
    """Mask the units of highest importance."""
    mask = torch.zeros(len(importance), dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:count]] = True
    return mask
