"""LLM-Pruner (Ma et al., arXiv 2305.11627): remove the attention heads and MLP channels that change the loss least.

Dependency groups say what must be removed together (`methods.llm_pruner.groups`). The result is a smaller dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

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
from laconic.runtime.inputs import open_input
from laconic.runtime.reading import load_dense
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask, check_finite, parameter_counts
from laconic.stages.stage import Needs
from laconic.structure.anatomy import Anatomy, dissect
from laconic.structure.widths import add_widths, make_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LlmPruner(ModelStage):
    """Structured pruning by dependency groups.

    Attributes:
        sparsity: Share of the parameters of the targeted groups to remove.
        groups: Kinds of groups: `attention` (key-value heads with their query heads) and `mlp` (channels, of experts
            too); or `hidden` alone, channels of the residual stream.
        importance: Order of the Taylor series of the loss, `first` or `second`; `weight` (squares of weights) and
            `random` are baselines that need no calibration text.
        aggregation: How terms of a matrix are combined: `element` sums absolute terms of single weights, `vector`
            takes the absolute sum of a row or column.
        pooling: How the importances of a unit's matrices are combined.
        keep_first: Number of first blocks that are not pruned; None for an eighth of them.
        keep_last: Number of last blocks that are not pruned; None for a sixteenth of them.
        uniform: Whether all blocks get the same widths, which a stock config can describe.
        heads: Number of query heads that remain in every block; None chooses by importance.
        multiple_of: Widths of MLPs, or the hidden size, are multiples of it; None chooses it by the width.
        batch_size: Samples per gradient.
        dtype: Dtype in which gradients are computed.
        gradient_checkpointing: Whether to save memory by a second forward pass of each block.
    """

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
        """Whether channels of the residual stream are pruned."""
        return "hidden" in self.groups

    @property
    def narrowing(self) -> Narrowing:
        """Requested widths of groups within blocks."""
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
            residual_axes(model, source.raw)
            check_sparsity(self.sparsity, [self.narrowing.channel_limits(model.config.get_text_config().hidden_size)])
            return {}
        self.narrowing.find_targets(model, dissect(model), source.raw)
        return {}

    def check_parallel(self, gpus: int) -> None:
        if gpus == 1:
            return
        if "attention" in self.groups and (self.heads is None or self.heads % gpus):
            raise ValueError(
                f"tensor_parallel {gpus} needs the same number of heads on every GPU; set heads to a multiple of {gpus}"
            )
        if {"mlp", "hidden"} & {*self.groups} and (self.multiple_of is None or self.multiple_of % gpus):
            raise ValueError(
                f"tensor_parallel {gpus} needs widths that it divides; set multiple_of to a multiple of {gpus}, and of "
                f"{32 * gpus} for groups of 32"
            )

    def apply(self, task: ModelTask) -> ModelOutcome:
        raw = open_input(str(task.folder), trust=task.trust).raw
        model = load_dense(task.folder, device=task.device, dtype=_DTYPES[self.dtype], trust=task.trust)
        anatomy = dissect(model)
        if self.hidden:
            return self._prune_hidden(task, model, anatomy, raw)
        targets, counts = self.narrowing.find_targets(model, anatomy, raw)
        targets, importance = self._rate_units(task, model, anatomy, targets)
        chosen = self.narrowing.choose_units(targets, counts, importance, unit_sizes(model, anatomy, targets))
        masks = {
            (i, group): mask
            for (i, group), mask in zip(targets.flat, chosen, strict=True)
            if not bool(mask.all()) or (self.uniform and group.fits_stock_config)
        }
        config = self._config(raw, len(anatomy.taps), masks)
        pruned = rebuild_model({**raw, **config}, _remove_units(model, anatomy, masks), _DTYPES[self.dtype])
        events = [{"event": "pruned", "block": i, **_describe(group, mask)} for (i, group), mask in masks.items()]
        result = {"method": self.method, **parameter_counts(model, pruned), "blocks": events}
        return ModelOutcome(pruned, config, events, {"pruning": result})

    def _prune_hidden(
        self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, raw: Mapping[str, Any]
    ) -> ModelOutcome:
        axes = residual_axes(model, raw)
        hidden = model.config.get_text_config().hidden_size
        check_sparsity(self.sparsity, [self.narrowing.channel_limits(hidden)])
        # Tied parameters count once.
        names = [n for n, _ in model.named_parameters() if n in axes]
        if self.importance == "random":
            importance = torch.rand(hidden, generator=torch.Generator().manual_seed(task.seed))
        else:
            grads = self._gradients(task, model, anatomy, names)
            vector = self.aggregation == "vector"
            parts = [channel_importance(self._terms(model, name, grads), axes[name], vector=vector) for name in names]
            importance = pool(parts, self.pooling).cpu()
            check_finite(importance, "the gradients" if self.needs.gradients else "the weights")
        mask = choose_channels(importance, self.sparsity, self.narrowing.channel_step(hidden))
        config = hidden_size_keys(raw, int(mask.sum()))
        pruned = rebuild_model({**raw, **config}, remove_channels(tensors_of(model), axes, mask), _DTYPES[self.dtype])
        event = {"event": "pruned", "group": "hidden", "channels": int(mask.sum()), "of": hidden}
        result = {"method": self.method, **parameter_counts(model, pruned), "blocks": [event]}
        return ModelOutcome(pruned, {k: v for k, v in config.items() if raw.get(k) != v}, [event], {"pruning": result})

    def _rate_units(
        self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, targets: TargetGroups
    ) -> tuple[TargetGroups, list[Tensor]]:
        """Compute the importance of the units of each group; units of experts are formed by it.

        Returns:
            The groups, and (units,) of each.
        """
        random = torch.Generator().manual_seed(task.seed)
        if self.importance == "random":
            # Proportional to the size of a unit, so that heads and channels are equally likely per parameter.
            random_values = [torch.rand(g.units, generator=random) for _, g in targets.flat]
            sizes = unit_sizes(model, anatomy, targets)
            return targets, [v * size for v, size in zip(random_values, sizes, strict=True)]
        names = {f"{anatomy.block_name(i)}.{s.linear}.weight" for i, group in targets.flat for s in group.slices}
        grads = self._gradients(task, model, anatomy, sorted(names))
        blocks: dict[int, list[Group]] = {}
        importance = []
        for i, group in targets.flat:
            matched, values = self._group_importance(model, anatomy.block_name(i), group, grads)
            blocks.setdefault(i, []).append(matched)
            importance.append(values)
        check_finite(torch.cat(importance), "the gradients" if self.needs.gradients else "the weights")
        return TargetGroups(blocks), importance

    def _gradients(self, task: ModelTask, model: PreTrainedModel, anatomy: Anatomy, names: Sequence[str]) -> Gradients:
        """Compute gradients on the calibration text; none if importance depends on weights alone."""
        if not self.needs.gradients:
            return Gradients({}, {})
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
    def _terms(self, model: PreTrainedModel, name: str, grads: Gradients) -> Tensor:
        """Compute the Taylor term of each weight of a parameter; squares of the weights without gradients."""
        w = model.get_parameter(name).float()
        if not grads.mean:
            return w.square()
        if name not in grads.mean:
            raise ValueError(
                f"no token of the calibration text was routed to {name.rsplit('.', 2)[0]}; use more samples, or "
                "importance: weight"
            )
        return taylor_terms(w, grads.mean[name], grads.square.get(name))

    @torch.no_grad()
    def _group_importance(
        self, model: PreTrainedModel, block: str, group: Group, grads: Gradients
    ) -> tuple[Group, Tensor]:
        """Compute the importance of a group's units; for experts, after forming units of channels of equal rank."""

        def importance(s: Slice, channels: Tensor) -> Tensor:
            terms = self._terms(model, f"{block}.{s.linear}.weight", grads)
            return unit_importance(terms, s.axis, channels, self.aggregation).cpu()

        if len(group.by_module) > 1:
            by_channel = {
                name: pool([importance(s, s.channels.view(-1, 1)) for s in slices], self.pooling)
                for name, slices in group.by_module.items()
            }
            group = match_channels(group, by_channel)
        return group, pool([importance(s, s.channels) for s in group.slices], self.pooling)

    def _config(self, raw: Mapping[str, Any], count: int, masks: Mapping[tuple[int, Group], Tensor]) -> dict[str, Any]:
        """Return the keys of config.json that change."""
        widths: list[dict[str, int]] = [{} for _ in range(count)]
        for (i, group), mask in masks.items():
            widths[i] |= group.widths(int(mask.sum()))
        if not self.uniform:
            changed = add_widths(raw, widths) if masks else dict(raw)
            return {k: v for k, v in changed.items() if raw.get(k) != v}
        heads = any(group.kind == "attention" for _, group in masks)
        # Without head_dim, transformers would compute the head width from the new number of heads.
        d: dict[str, Any] = {"head_dim": raw.get("head_dim") or _head_dim(raw)} if heads and _head_dim(raw) else {}
        return {key: value for block in widths for key, value in block.items()} | d

    def warnings(self, source: Source) -> Iterator[str]:
        if not self.uniform and not self.hidden and self.sparsity:
            yield (
                "llm_pruner without uniform gives each block its own widths: transformers opens that after 'import "
                "laconic', vLLM with laconic installed beside it"
            )


def _head_dim(raw: Mapping[str, Any]) -> int | None:
    """Return the head width that transformers reads from a config.json, if it has one."""
    return getattr(make_config(raw), "head_dim", None)


def _remove_units(
    model: PreTrainedModel, anatomy: Anatomy, masks: Mapping[tuple[int, Group], Tensor]
) -> dict[str, Tensor]:
    """Remove the units outside the masks from all parameters of the model."""
    tensors = tensors_of(model)
    for (i, group), mask in masks.items():
        prefix = f"{anatomy.block_name(i)}."
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        tensors |= {f"{prefix}{n}": t for n, t in remove_units(inside, group, mask).items()}
    return tensors


def _describe(group: Group, mask: Tensor) -> dict[str, Any]:
    """Describe what remains of a group, for the log."""
    units = int(mask.sum())
    if group.kind == "mlp":
        experts = {"experts": len(group.by_module)} if len(group.by_module) > 1 else {}
        return {"group": "mlp", "channels": units, "of": len(mask), **experts}
    return {
        "group": "attention",
        "heads": units * group.heads,
        "kv_heads": units * group.kv_heads or 1,
        "of": len(mask),
    }
