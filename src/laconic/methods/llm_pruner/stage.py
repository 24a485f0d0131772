"""LLM-Pruner (Ma et al., arXiv 2305.11627): remove the attention heads and MLP channels that change the loss least.

What must go together is found by structure (`methods.llm_pruner.groups`). What is left is a smaller dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.files import read_json
from laconic.checkpoint.rebuild import rebuild_model, tensors_of
from laconic.checkpoint.source import Source
from laconic.methods.llm_pruner.gradients import Gradients, compute_gradients
from laconic.methods.llm_pruner.groups import Group, Kind, Slice, match_channels, remove_units
from laconic.methods.llm_pruner.limits import check_sparsity
from laconic.methods.llm_pruner.narrowing import Narrowing, TargetGroups, unit_sizes
from laconic.methods.llm_pruner.residual_width import (
    channel_importance,
    choose_channels,
    hidden_size_keys,
    remove_channels,
    residual_axes,
)
from laconic.methods.llm_pruner.saliency import Aggregation, Pooling, pool, taylor_terms, unit_importance
from laconic.runtime.reading import load
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask, check_finite, parameter_counts
from laconic.stages.stage import Needs
from laconic.structure.anatomy import Anatomy, dissect
from laconic.structure.widths import add_widths, make_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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

    example: ClassVar = {"keep_first": 1, "keep_last": 0}

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
    def narrowing(self) -> Narrowing:
        """What is asked of the groups that lie within a block."""
        kinds: list[Kind] = [kind for kind in self.groups if kind != "hidden"]
        return Narrowing(
            sparsity=self.sparsity,
            kinds=kinds,
            uniform=self.uniform,
            heads=self.heads,
            multiple_of=self.multiple_of,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
        )

    @property
    def needs(self) -> Needs:
        by_gradient = self.importance in ("first", "second")
        return Needs(activations=by_gradient, gradients=by_gradient)

    @property
    def reshapes(self) -> bool:
        return True

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        if self.hidden:
            residual_axes(model, read_json(source.folder / "config.json"))
            check_sparsity(self.sparsity, [self.narrowing.channel_limits(model.config.get_text_config().hidden_size)])
            return {}
        self.narrowing.find_targets(model, dissect(model), read_json(source.folder / "config.json"))
        return {}

    def apply(self, task: ModelTask) -> ModelOutcome:
        raw = read_json(task.folder / "config.json")
        model = load(task.folder, device=task.device, dtype=_DTYPES[self.dtype], trust=task.trust)
        anatomy = dissect(model)
        if self.hidden:
            return self._without_hidden(task, model, anatomy, raw)
        targeted, counts = self.narrowing.find_targets(model, anatomy, raw)
        targeted, importance = self._weigh(task, model, anatomy, targeted)
        kept = self.narrowing.choose_units(targeted, counts, importance, unit_sizes(model, anatomy, targeted))
        masks = {
            (i, group): mask
            for (i, group), mask in zip(targeted.flat, kept, strict=True)
            if not bool(mask.all()) or (self.uniform and group.fits_stock_config)
        }
        config = self._config(raw, len(anatomy.taps), masks)
        made = rebuild_model({**raw, **config}, _narrowed(model, anatomy, masks), _DTYPES[self.dtype])
        events = [{"event": "pruned", "block": i, **_told(group, mask)} for (i, group), mask in masks.items()]
        result = {"method": self.method, **parameter_counts(model, made), "blocks": events}
        return ModelOutcome(made, config, events, {"pruning": result})

    def _without_hidden(
        self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, raw: Mapping[str, Any]
    ) -> ModelOutcome:
        axes = residual_axes(model, raw)
        hidden = model.config.get_text_config().hidden_size
        check_sparsity(self.sparsity, [self.narrowing.channel_limits(hidden)])
        # One of each that is tied.
        names = [n for n, _ in model.named_parameters() if n in axes]
        if self.importance == "random":
            importance = torch.rand(hidden, generator=torch.Generator().manual_seed(task.seed))
        else:
            found = self._gradients(task, model, anatomy, names)
            vector = self.aggregation == "vector"
            parts = [channel_importance(self._changes(model, name, found), axes[name], vector=vector) for name in names]
            importance = pool(parts, self.pooling).cpu()
            check_finite(importance, "the gradients" if self.needs.gradients else "the weights")
        mask = choose_channels(importance, self.sparsity, self.narrowing.channel_step(hidden))
        config = hidden_size_keys(raw, int(mask.sum()))
        made = rebuild_model({**raw, **config}, remove_channels(tensors_of(model), axes, mask), _DTYPES[self.dtype])
        event = {"event": "pruned", "group": "hidden", "channels": int(mask.sum()), "of": hidden}
        result = {"method": self.method, **parameter_counts(model, made), "blocks": [event]}
        return ModelOutcome(made, {k: v for k, v in config.items() if raw.get(k) != v}, [event], {"pruning": result})

    def _weigh(
        self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, targeted: TargetGroups
    ) -> tuple[TargetGroups, list[Tensor]]:
        """The groups with their units matched, and the importance of these."""
        random = torch.Generator().manual_seed(task.seed)
        if self.importance == "random":
            # A unit is the more likely to stay the larger it is, so that neither kind goes first.
            drawn = [torch.rand(g.units, generator=random) for _, g in targeted.flat]
            sizes = unit_sizes(model, anatomy, targeted)
            return targeted, [v * size for v, size in zip(drawn, sizes, strict=True)]
        names = {f"{anatomy.block_name(i)}.{part.linear}.weight" for i, group in targeted.flat for part in group.slices}
        found = self._gradients(task, model, anatomy, sorted(names))
        blocks: dict[int, list[Group]] = {}
        importance = []
        for i, group in targeted.flat:
            own, values = self._of_group(model, anatomy.block_name(i), group, found)
            blocks.setdefault(i, []).append(own)
            importance.append(values)
        check_finite(torch.cat(importance), "the gradients" if self.needs.gradients else "the weights")
        return TargetGroups(blocks), importance

    def _gradients(self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, names: Sequence[str]) -> Gradients:
        """Of the loss on the calibration text; none where weights alone are asked."""
        if not self.needs.gradients:
            return Gradients({}, {})
        assert task.windows is not None
        return compute_gradients(
            model,
            names,
            task.windows,
            batch_size=self.batch_size,
            squares=self.importance == "second",
            checkpointing=self.gradient_checkpointing,
            blocks=list(model.get_submodule(anatomy.blocks).children()),
            report=task.report,
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
        return taylor_terms(w, found.mean[name], found.square.get(name))

    @torch.no_grad()
    def _of_group(self, model: PreTrainedModel, block: str, group: Group, found: Gradients) -> tuple[Group, Tensor]:
        """The group with the best channels of every expert together, and the importance of its units."""

        def of(part: Slice, channels: Tensor) -> Tensor:
            changes = self._changes(model, f"{block}.{part.linear}.weight", found)
            return unit_importance(changes, part.axis, channels, self.aggregation).cpu()

        if len(group.by_module) > 1:
            singly = {
                name: pool([of(part, part.channels.view(-1, 1)) for part in own], self.pooling)
                for name, own in group.by_module.items()
            }
            group = match_channels(group, singly)
        return group, pool([of(part, part.channels) for part in group.slices], self.pooling)

    def _config(self, raw: Mapping[str, Any], count: int, masks: Mapping[tuple[int, Group], Tensor]) -> dict[str, Any]:
        """The keys of config.json that change."""
        widths: list[dict[str, int]] = [{} for _ in range(count)]
        for (i, group), mask in masks.items():
            widths[i] |= group.widths(int(mask.sum()))
        if not self.uniform:
            changed = add_widths(raw, widths) if masks else dict(raw)
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


def _narrowed(model: PreTrainedModel, anatomy: Anatomy, masks: Mapping[tuple[int, Group], Tensor]) -> dict[str, Tensor]:
    tensors = tensors_of(model)
    for (i, group), mask in masks.items():
        prefix = f"{anatomy.block_name(i)}."
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        tensors |= {f"{prefix}{n}": t for n, t in remove_units(inside, group, mask).items()}
    return tensors


def _told(group: Group, mask: Tensor) -> dict[str, Any]:
    kept = int(mask.sum())
    if group.kind == "mlp":
        experts = {"experts": len(group.by_module)} if len(group.by_module) > 1 else {}
        return {"group": "mlp", "channels": kept, "of": len(mask), **experts}
    return {"group": "attention", "heads": kept * group.heads, "kv_heads": kept * group.kv_heads or 1, "of": len(mask)}
