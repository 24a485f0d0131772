"""Depth pruning (ShortGPT: Men et al., arXiv 2403.03853): drop the decoder blocks that change their input least.

The heuristic to measure other structured pruning by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import rebuild_model, tensors_of
from laconic.checkpoint.source import Source
from laconic.runtime.inputs import open_input
from laconic.runtime.reading import load_dense
from laconic.stages.model import (
    ModelOutcome,
    ModelStage,
    ModelTask,
    Report,
    check_finite,
    parameter_counts,
    run_batches,
)
from laconic.stages.stage import Needs
from laconic.structure.anatomy import find_blocks
from laconic.structure.hooks import Hook, forward_hooks
from laconic.structure.widths import make_config


class Depth(ModelStage):
    """Depth pruning: drop whole blocks.

    Attributes:
        blocks: Number of blocks to drop.
        sparsity: Share of blocks to drop, instead of their number.
        batch_size: Samples per forward pass.
    """

    example: ClassVar = {"blocks": 1}

    method: Literal["depth"] = "depth"
    blocks: int | None = Field(None, ge=0)
    sparsity: float | None = Field(None, ge=0, lt=1)
    batch_size: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Depth:
        if (self.blocks is None) == (self.sparsity is None):
            raise ValueError("set the number of blocks to drop: either blocks: 2 or sparsity: 0.2, and not both")
        return self

    @property
    def needs(self) -> Needs:
        return Needs(activations=True)

    @property
    def reshapes(self) -> bool:
        return True

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        kinds = _kinds(model, list(model.get_submodule(find_blocks(model)).children()))
        count, distinct = self._count(len(kinds)), len(set(kinds))
        if count > len(kinds) - distinct:
            raise ValueError(
                f"the model has {len(kinds)} blocks of {distinct} kinds, and {count} would be dropped; one of each "
                f"kind must stay, so drop at most {len(kinds) - distinct}"
            )
        if model.config.get_text_config() is not model.config:
            raise ValueError(f"'{model.config.model_type}' is more than a language model; depth prunes plain ones")
        return {}

    def apply(self, task: ModelTask) -> ModelOutcome:
        raw = open_input(str(task.folder), trust=task.trust).raw
        model = load_dense(task.folder, device=task.device, dtype=torch.float32, trust=task.trust)
        name = find_blocks(model)
        blocks = list(model.get_submodule(name).children())
        influence = compute_influence(model, blocks, task.windows, self.batch_size, task.report)
        dropped = _least(influence, _kinds(model, blocks), self._count(len(blocks)))
        remaining = [i for i in range(len(blocks)) if i not in dropped]
        config = _shortened(raw, remaining)
        shortened = rebuild_model({**raw, **config}, _renumbered(tensors_of(model), name, remaining), torch.float32)
        events = [
            {"event": "block_influence", "block": i, "influence": float(v), "dropped": i in dropped}
            for i, v in enumerate(influence)
        ]
        result = {"method": self.method, **parameter_counts(model, shortened), "dropped": dropped}
        return ModelOutcome(shortened, config, events, {"pruning": result}, remaining)

    def _count(self, blocks: int) -> int:
        """Return the number of blocks to drop.

        Raises:
            ValueError: No block would remain, or none would be dropped.
        """
        count = self.blocks if self.blocks is not None else round((self.sparsity or 0) * blocks)
        if count == 0 and self.sparsity:
            raise ValueError(f"sparsity {self.sparsity} of {blocks} blocks is less than one; use blocks: 1")
        if count >= blocks:
            raise ValueError(f"the model has {blocks} blocks, and {count} would be dropped; one at least must stay")
        return count


def _kinds(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> list[Any]:
    """Return the kind of each block: its layer type in the config, and the classes of its modules."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    types = types if types and len(types) == len(blocks) else [None] * len(blocks)
    modules = (tuple((n, type(m).__name__) for n, m in block.named_modules()) for block in blocks)
    return list(zip(types, modules, strict=True))


def _least(influence: Tensor, kinds: Sequence[Any], count: int) -> list[int]:
    """Choose the blocks of least influence; the last block of a kind stays."""
    remaining, dropped = Counter(kinds), list[int]()
    for i in influence.argsort(stable=True).tolist():
        if len(dropped) < count and remaining[kinds[i]] > 1:
            remaining[kinds[i]] -= 1
            dropped.append(i)
    return sorted(dropped)


@torch.no_grad()
def compute_influence(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    windows: Tensor,
    batch_size: int = 1,
    report: Report = lambda _: None,
) -> Tensor:
    """Compute the influence of each block: the mean over tokens of 1 - cos(input, output) (arXiv 2403.03853, eq. 1).

    Args:
        model: The model.
        blocks: Its decoder blocks.
        windows: Token ids (samples, tokens).
        batch_size: Samples per forward pass.
        report: Called with a progress event after each batch.

    Returns:
        (blocks,) float64.

    Raises:
        ValueError: An influence is NaN or infinite.
    """
    similarity = torch.zeros(len(blocks), dtype=torch.float64)

    def add_similarity(i: int) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            similarity[i] += torch.cosine_similarity(before.double(), after.double(), dim=-1).sum().cpu()

        return hook

    with forward_hooks(((block, add_similarity(i)) for i, block in enumerate(blocks)), with_kwargs=True):
        run_batches(model, windows, batch_size, report)
    influence = 1 - similarity / windows.numel()
    check_finite(influence, "the activations")
    return influence


def _shortened(raw: Mapping[str, Any], remaining: Sequence[int]) -> dict[str, Any]:
    """Return the keys of config.json that change: the number of blocks, and lists with an item per block."""
    config = make_config(raw)
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = getattr(config, key)
    changed: dict[str, Any] = {key: len(remaining)}
    changed |= {k: [v[i] for i in remaining] for k, v in raw.items() if isinstance(v, list) and len(v) == count}
    types = getattr(config, "layer_types", None)
    remaining_types = [types[i] for i in remaining] if types else None
    if types and getattr(make_config({**raw, **changed}), "layer_types", None) != remaining_types:
        changed["layer_types"] = remaining_types
    return changed


def _renumbered(tensors: Mapping[str, Tensor], blocks: str, remaining: Sequence[int]) -> dict[str, Tensor]:
    """Rename tensors for a model of the remaining blocks alone."""
    new_numbers = {old: i for i, old in enumerate(remaining)}
    out = {}
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        if not name.startswith(f"{blocks}."):
            out[name] = tensor
        elif int(number) in new_numbers:
            out[f"{blocks}.{new_numbers[int(number)]}.{rest}"] = tensor
    return out
