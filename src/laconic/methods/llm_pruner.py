"""LLM-Pruner (Ma et al., arXiv 2305.11627): attention heads and MLP channels that the loss misses least are taken out.

What must go together is found by structure (`model.groups`). What is left is a smaller dense model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from laconic.engine.gradients import Gradients, gradients
from laconic.engine.model_stage import ModelStage, Remade, Work, check_finite, sizes_of
from laconic.model.anatomy import Anatomy, dissect
from laconic.model.checkpoint import read_json
from laconic.model.groups import Group, Kind, Slice, find_groups, matched, narrow
from laconic.model.load import Source
from laconic.model.reading import load
from laconic.model.rebuild import empty, parts_of, rebuilt
from laconic.model.stream_width import by_channel, kept_channels, narrower, stream_axes, without_channels
from laconic.model.widths import WIDTHS, make_config, with_widths
from laconic.solvers.reach import Reach, check_reach
from laconic.solvers.saliency import Aggregation, Pooling, cut, of_units, pooled, taylor

# What widths of experts are a multiple of: products of all at once, in transformers, take rows of whole 16 bytes.
_EXPERT_STEP = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Targeted:
    """Groups that may become narrower, by block, of the blocks that are not protected."""

    blocks: Mapping[int, Sequence[Group]]

    @property
    def flat(self) -> list[tuple[int, Group]]:
        """Block and group, one after another."""
        return [(i, group) for i, groups in self.blocks.items() for group in groups]


class LlmPruner(ModelStage):
    """sparsity: share of the parameters of the targeted groups that goes. groups: of `attention` (key-value heads with
    their query heads) and `mlp` (channels, of experts too); or `hidden` alone, channels of the residual stream.
    importance: `first` or `second` order of the loss's Taylor series; `weight` (squares of weights) and `random` are
    baselines, and need no calibration text. aggregation, pooling: how the importance of an `element` or a `vector`
    becomes a matrix's, and those of matrices a unit's. keep_first, keep_last: blocks that stay whole; an eighth and a
    sixteenth of them when not given. uniform: the same widths in all blocks, which a stock config can say. heads: how
    many query heads stay in a block, instead of as many as importance says. multiple_of: of what an MLP's or the hidden
    width is a multiple; by the width when not given. batch_size: samples a gradient is taken of. dtype: in which
    gradients are computed. gradient_checkpointing: less memory for a second forward pass."""

    method: Literal["llm_pruner"] = "llm_pruner"
    sparsity: float = Field(0.2, ge=0, lt=1)
    groups: tuple[Literal["attention", "mlp", "hidden"], ...] = Field(("attention", "mlp"), min_length=1)
    importance: Literal["first", "second", "weight", "random"] = "first"
    aggregation: Aggregation = "element"
    pooling: Pooling = "sum"
    keep_first: int | None = Field(None, ge=0)
    keep_last: int | None = Field(None, ge=0)
    uniform: bool = False
    heads: int | None = Field(None, ge=1)
    multiple_of: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    @field_validator("groups", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> LlmPruner:
        if len({*self.groups}) < len(self.groups):
            raise ValueError(f"groups names one twice ({', '.join(self.groups)}); name each once")
        if self.uniform and (self.keep_first or self.keep_last):
            raise ValueError("uniform gives all blocks the same widths; leave out keep_first and keep_last")
        if self.hidden and len(self.groups) > 1:
            raise ValueError(
                "a hidden channel is part of every head and MLP: give groups: [hidden] a stage of its own, and the "
                "others another"
            )
        if self.hidden and (self.keep_first or self.keep_last):
            raise ValueError("a hidden channel reaches through all blocks; leave out keep_first and keep_last")
        if self.heads and "attention" not in self.groups:
            raise ValueError("heads counts those of attention; add attention to groups, or leave heads out")
        return self

    @property
    def hidden(self) -> bool:
        """Whether channels of the residual stream are what goes."""
        return "hidden" in self.groups

    @property
    def blockwise(self) -> tuple[Kind, ...]:
        """The kinds of groups that lie within a block."""
        return tuple(kind for kind in self.groups if kind != "hidden")

    @property
    def observes(self) -> bool:
        return self.importance in ("first", "second")

    @property
    def reshapes(self) -> bool:
        return True

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        if self.hidden:
            stream_axes(model, read_json(source.folder / "config.json"))
            check_reach(self.sparsity, [self._channels(model.config.get_text_config().hidden_size)])
            return {}
        self._ways(read_json(source.folder / "config.json"), model, dissect(model))
        return {}

    def remake(self, work: Work) -> Remade:
        raw = read_json(work.folder / "config.json")
        model = load(
            work.folder, device=work.device, dtype=_DTYPES[self.dtype], trust_remote_code=work.trust_remote_code
        )
        anatomy = dissect(model)
        if self.hidden:
            return self._without_hidden(work, model, anatomy, raw)
        targeted, counts = self._ways(raw, model, anatomy)
        targeted, importance = self._weigh(work, model, anatomy, targeted)
        sizes = [group.unit_size(model.get_submodule(anatomy.block_name(i))) for i, group in targeted.flat]
        if self.uniform:
            kept = [_best(v, counts[tuple(g.keys)]) for v, (_, g) in zip(importance, targeted.flat, strict=True)]
        else:
            kept = self._cut(targeted, importance, sizes)
        masks = {
            (i, group): mask
            for (i, group), mask in zip(targeted.flat, kept, strict=True)
            if not bool(mask.all()) or (self.uniform and group.stock)
        }
        config = self._config(raw, len(anatomy.taps), masks)
        made = rebuilt({**raw, **config}, _narrowed(model, anatomy, masks), _DTYPES[self.dtype])
        events = [{"event": "pruned", "block": i, **_told(group, mask)} for (i, group), mask in masks.items()]
        result = {"method": self.method, **sizes_of(model, made), "blocks": events}
        return Remade(made, config, events, {"pruning": result})

    def _without_hidden(self, work: Work, model: PreTrainedModel, anatomy: Anatomy, raw: Mapping[str, Any]) -> Remade:
        axes = stream_axes(model, raw)
        hidden = model.config.get_text_config().hidden_size
        check_reach(self.sparsity, [self._channels(hidden)])
        # One of each that is tied.
        names = [n for n, _ in model.named_parameters() if n in axes]
        if self.importance == "random":
            importance = torch.rand(hidden, generator=torch.Generator().manual_seed(work.seed))
        else:
            found = self._gradients(work, model, anatomy, names)
            vector = self.aggregation == "vector"
            parts = [by_channel(self._changes(model, name, found), axes[name], vector=vector) for name in names]
            importance = pooled(parts, self.pooling).cpu()
            check_finite(importance, "the gradients" if self.observes else "the weights")
        mask = kept_channels(importance, self.sparsity, self._channel_step(hidden))
        config = narrower(raw, int(mask.sum()))
        made = rebuilt({**raw, **config}, without_channels(parts_of(model), axes, mask), _DTYPES[self.dtype])
        event = {"event": "pruned", "group": "hidden", "channels": int(mask.sum()), "of": hidden}
        result = {"method": self.method, **sizes_of(model, made), "blocks": [event]}
        return Remade(made, {k: v for k, v in config.items() if raw.get(k) != v}, [event], {"pruning": result})

    def _target(self, model: PreTrainedModel, anatomy: Anatomy) -> Targeted:
        """Raises: ValueError when nothing could be pruned, or not what was asked for."""
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
        groups = find_groups(model, anatomy, self.blockwise)
        inside = {i: groups[i] for i in range(first, count - last)}
        for asked in self.blockwise:
            if not any(g.kind == asked for own in inside.values() for g in own):
                other = [k for k in self.blockwise if k != asked and any(g.kind == k for g in inside[first])]
                fix = f"set groups: [{other[0]}]" if other else "use depth, which drops whole blocks"
                raise ValueError(
                    f"the {asked} of '{kind}' cannot be made narrower: a part of it computes something else, or no "
                    f"config says how wide it is; {fix}"
                )
        if (
            self.multiple_of
            and self.multiple_of % _EXPERT_STEP
            and any(len(g.parts) > 1 for own in inside.values() for g in own)
        ):
            raise ValueError(
                f"multiple_of {self.multiple_of}: transformers multiplies by experts whose width is a multiple of "
                f"{_EXPERT_STEP}; use {math.ceil(self.multiple_of / _EXPERT_STEP) * _EXPERT_STEP}"
            )
        return Targeted(inside)

    def _ways(
        self, raw: Mapping[str, Any], model: PreTrainedModel, anatomy: Anatomy
    ) -> tuple[Targeted, dict[tuple[str, ...], int]]:
        """What may become narrower; and where all blocks are to be alike, how many units stay of the groups that some
        keys of the config say.

        Raises: ValueError when nothing could be pruned, or not what was asked for.
        """
        targeted = self._target(model, anatomy)
        counts = self._uniform_counts(raw, model, targeted) if self.uniform else {}
        fixed = self._fixed(targeted)
        found = []
        for i, group in targeted.flat:
            size = group.unit_size(model.get_submodule(anatomy.block_name(i)))
            if group.kind == "mlp":
                step = self._step(group)
                found.append(replace(self._channels(group.units), size=size, stays=step, step=step))
            else:
                found.append(Reach(size, group.units, fixed or 1, 1, fixed is not None))
        check_reach(self.sparsity, found)
        return targeted, counts

    def _channels(self, width: int) -> Reach:
        """Raises: ValueError when they can be no multiple of what they are to be one of."""
        if self.multiple_of and self.multiple_of > width:
            raise ValueError(
                f"multiple_of {self.multiple_of} is more than the {width} channels that there are; lower it"
            )
        step = self._channel_step(width)
        return Reach(1, width, step, step)

    def _step(self, group: Group) -> int:
        """How many units go at once."""
        if group.kind == "attention":
            return 1
        step = self._channel_step(group.units)
        return max(_EXPERT_STEP, step) if len(group.parts) > 1 and not self.multiple_of else step

    def _channel_step(self, width: int) -> int:
        # A sixteenth of the width, but a power of two up to 128, so that groups of later codes still fit.
        return self.multiple_of or min(128, 2 ** max(0, int(math.log2(max(1, width / 16)))))

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

    def _weigh(
        self, work: Work, model: PreTrainedModel, anatomy: Anatomy, targeted: Targeted
    ) -> tuple[Targeted, list[Tensor]]:
        """The groups with their units matched, and the importance of these."""
        random = torch.Generator().manual_seed(work.seed)
        if self.importance == "random":
            # A unit is the more likely to stay the larger it is, so that neither kind goes first.
            drawn = [torch.rand(g.units, generator=random) for _, g in targeted.flat]
            sizes = [g.unit_size(model.get_submodule(anatomy.block_name(i))) for i, g in targeted.flat]
            return targeted, [v * size for v, size in zip(drawn, sizes, strict=True)]
        names = {f"{anatomy.block_name(i)}.{part.linear}.weight" for i, group in targeted.flat for part in group.slices}
        found = self._gradients(work, model, anatomy, sorted(names))
        blocks: dict[int, list[Group]] = {}
        importance = []
        for i, group in targeted.flat:
            own, values = self._of_group(model, anatomy.block_name(i), group, found)
            blocks.setdefault(i, []).append(own)
            importance.append(values)
        check_finite(torch.cat(importance), "the gradients" if self.observes else "the weights")
        return Targeted(blocks), importance

    def _gradients(self, work: Work, model: PreTrainedModel, anatomy: Anatomy, names: Sequence[str]) -> Gradients:
        """Of the loss on the calibration text; none where weights alone are asked."""
        if not self.observes:
            return Gradients({}, {})
        assert work.windows is not None
        return gradients(
            model,
            names,
            work.windows,
            batch_size=self.batch_size,
            squares=self.importance == "second",
            checkpointing=self.gradient_checkpointing,
            blocks=list(model.get_submodule(anatomy.blocks).children()),
            report=work.report,
        )

    @torch.no_grad()
    def _changes(self, model: PreTrainedModel, name: str, found: Gradients) -> Tensor:
        """What the loss changes by without each of a parameter's weights; their squares where no gradient was asked."""
        w = model.get_parameter(name).float()
        if not found.mean:
            return w.square()
        if name not in found.mean:
            raise ValueError(
                f"no token of the calibration text was routed to {name.rsplit('.', 2)[0]}; use more samples, or "
                "importance: weight"
            )
        return taylor(w, found.mean[name], found.square.get(name))

    @torch.no_grad()
    def _of_group(self, model: PreTrainedModel, block: str, group: Group, found: Gradients) -> tuple[Group, Tensor]:
        """The group with the best channels of every expert together, and the importance of its units."""

        def of(part: Slice, channels: Tensor) -> Tensor:
            changes = self._changes(model, f"{block}.{part.linear}.weight", found)
            return of_units(changes, part.axis, channels, self.aggregation).cpu()

        if len(group.parts) > 1:
            singly = {
                name: pooled([of(part, part.channels.view(-1, 1)) for part in own], self.pooling)
                for name, own in group.parts.items()
            }
            group = matched(group, singly)
        return group, pooled([of(part, part.channels) for part in group.slices], self.pooling)

    def _cut(self, targeted: Targeted, importance: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
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

    def _uniform_counts(
        self, raw: Mapping[str, Any], model: PreTrainedModel, targeted: Targeted
    ) -> dict[tuple[str, ...], int]:
        """How many units stay in every block, of the groups that some keys of the config say. Heads that a stock config
        cannot do without stay, and the MLP makes up for them."""
        if WIDTHS in raw:
            raise ValueError("the blocks of this model differ in width already, which uniform cannot undo")
        anatomy = dissect(model)
        alike: dict[tuple[str, ...], list[Group]] = {}
        totals: dict[tuple[str, ...], int] = {}
        for i, group in targeted.flat:
            keys = tuple(group.keys)
            alike.setdefault(keys, []).append(group)
            totals[keys] = totals.get(keys, 0) + group.units * group.unit_size(
                model.get_submodule(anatomy.block_name(i))
            )
        if any(g.units != groups[0].units for groups in alike.values() for g in groups):
            raise ValueError("the blocks of this model differ in width; leave out uniform")
        target = self.sparsity * sum(totals.values())
        counts: dict[tuple[str, ...], int] = {}
        for keys, (group, *_) in alike.items():
            if group.kind == "attention":
                counts[keys] = self._uniform_heads(raw, model, targeted, group)
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

    def _uniform_heads(self, raw: Mapping[str, Any], model: PreTrainedModel, targeted: Targeted, group: Group) -> int:
        fixed = self._fixed(targeted)
        least = fixed if fixed is not None else max(1, math.ceil(group.units * (1 - self.sparsity)))
        choices = [least] if fixed is not None else range(least, group.units + 1)
        accepted = [n for n in choices if n == group.units or _is_said(raw, group, n, model.dtype)]
        if not accepted:
            raise ValueError(
                f"a stock config of '{raw['model_type']}' cannot have {self.heads} heads; leave out uniform"
            )
        return accepted[0]

    def _config(self, raw: Mapping[str, Any], count: int, masks: Mapping[tuple[int, Group], Tensor]) -> dict[str, Any]:
        """The keys of config.json that change."""
        widths: list[dict[str, int]] = [{} for _ in range(count)]
        for (i, group), mask in masks.items():
            widths[i] |= group.widths(int(mask.sum()))
        if not self.uniform:
            changed = with_widths(raw, widths) if masks else dict(raw)
            return {k: v for k, v in changed.items() if raw.get(k) != v}
        heads = any(group.kind == "attention" for _, group in masks)
        # A head's width is told by the number of heads where it is not given.
        d: dict[str, Any] = {"head_dim": raw.get("head_dim") or _head_dim(raw)} if heads and _head_dim(raw) else {}
        return {key: value for own in widths for key, value in own.items()} | d

    def warnings(self, source: Source) -> Iterator[str]:
        if not self.uniform and not self.hidden and self.sparsity:
            yield (
                "llm_pruner without uniform gives each block its own widths: transformers opens that after 'import "
                "laconic', vLLM with laconic installed beside it"
            )


def _head_dim(raw: Mapping[str, Any]) -> int | None:
    return getattr(make_config(raw), "head_dim", None)


def _is_said(raw: Mapping[str, Any], group: Group, kept: int, dtype: torch.dtype) -> bool:
    """Whether a stock config can say that all blocks have so many units."""
    try:
        empty({**raw, **group.widths(kept)}, dtype)
    except ValueError:
        return False
    return group.stock


def _best(importance: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(importance), dtype=torch.bool)
    mask[importance.argsort(descending=True, stable=True)[:count]] = True
    return mask


def _narrowed(model: PreTrainedModel, anatomy: Anatomy, masks: Mapping[tuple[int, Group], Tensor]) -> dict[str, Tensor]:
    tensors = parts_of(model)
    for (i, group), mask in masks.items():
        prefix = f"{anatomy.block_name(i)}."
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        tensors |= {f"{prefix}{n}": t for n, t in narrow(inside, group, mask).items()}
    return tensors


def _told(group: Group, mask: Tensor) -> dict[str, Any]:
    kept = int(mask.sum())
    if group.kind == "mlp":
        experts = {"experts": len(group.parts)} if len(group.parts) > 1 else {}
        return {"group": "mlp", "channels": kept, "of": len(mask), **experts}
    return {"group": "attention", "heads": kept * group.heads, "kv_heads": kept * group.kv_heads or 1, "of": len(mask)}
