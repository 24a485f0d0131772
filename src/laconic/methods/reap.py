"""REAP (Lasby et al., arXiv 2510.13999): drop the experts with the smallest router-weighted output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.rebuild import build_empty_model, rebuild_model, tensors_of
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
from laconic.structure.experts import Experts, routers_of
from laconic.structure.hooks import Hook, forward_hooks


class Reap(ModelStage):
    """Router-weighted expert activation pruning: drop experts of a mixture.

    Attributes:
        sparsity: Share of the experts of every layer to drop.
        batch_size: Samples per forward pass.
    """

    example: ClassVar = {"sparsity": 0.25}

    method: Literal["reap"] = "reap"
    sparsity: float = Field(0.25, ge=0, lt=1)
    batch_size: int = Field(1, ge=1)

    @property
    def needs(self) -> Needs:
        return Needs(activations=True)

    @property
    def reshapes(self) -> bool:
        return True

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        self._keys(source.raw, model)
        return {}

    def apply(self, task: ModelTask) -> ModelOutcome:
        raw = open_input(str(task.folder), trust=task.trust).raw
        model = load_dense(task.folder, device=task.device, dtype=torch.float32, trust=task.trust)
        config = self._keys(raw, model)
        scores = compute_saliency(model, task.windows, self.batch_size, task.report)
        remaining = self._remaining(model)
        numbers = {
            name: s.argsort(descending=True, stable=True)[:remaining].sort().values for name, s in scores.items()
        }
        pruned = rebuild_model({**raw, **config}, _remove_experts(model, numbers), torch.float32)
        events = [
            {
                "event": "experts",
                "experts": name,
                "saliency": [float(v) for v in s],
                "dropped": sorted({*range(len(s))} - {*numbers[name].tolist()}),
            }
            for name, s in scores.items()
        ]
        return ModelOutcome(
            pruned, config, events, {"pruning": {"method": self.method, **parameter_counts(model, pruned)}}
        )

    def _remaining(self, model: PreTrainedModel) -> int:
        """Return the number of experts per layer that remain.

        Raises:
            ValueError: The model has no experts, or fewer would remain than a token is routed to.
        """
        layers = _layers(model)
        if not layers:
            raise ValueError("reap drops experts, and this model has none; use llm_pruner or depth")
        counts = {len(experts) for experts in layers.values()}
        if len(counts) > 1:
            raise ValueError("layers of this model differ in the number of experts, which reap cannot prune")
        (count,) = counts
        remaining = count - round(self.sparsity * count)
        if remaining == count and self.sparsity:
            raise ValueError(
                f"sparsity {self.sparsity} of {count} experts is less than one; use {1 / count:.4g} or more"
            )
        config = model.config.get_text_config()
        top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None) or 1
        if remaining < top_k:
            raise ValueError(
                f"sparsity {self.sparsity} leaves {remaining} of {count} experts, and a token is routed to {top_k}; "
                f"use at most {(count - top_k) / count:.4g}"
            )
        return remaining

    def _keys(self, raw: Mapping[str, Any], model: PreTrainedModel) -> dict[str, int]:
        """Find the keys of config.json for the number of experts, by trying, and return their new values."""
        remaining = self._remaining(model)
        experts = next(iter(_layers(model).values()))
        count = len(experts)
        if remaining == count:
            return {}
        values = {**raw, **{k: v for k, v in model.config.to_dict().items() if k not in raw}}
        keys = [k for k, v in values.items() if v == count and isinstance(v, int) and not isinstance(v, bool)]
        for names in [*((k,) for k in keys), *combinations(keys, 2)]:
            changed = dict.fromkeys(names, remaining)
            try:
                built = build_empty_model({**raw, **changed}, model.dtype)
            except ValueError:
                continue
            same = len(_layers(built)) == len(_layers(model)) and _differs_only_in_experts(built, model, remaining)
            if same:
                return changed
        raise ValueError(f"the config of '{model.config.model_type}' has no key for the number of experts")


def _differs_only_in_experts(built: PreTrainedModel, model: PreTrainedModel, remaining: int) -> bool:
    """Return whether a model has the shapes of another, except for its number of experts."""
    if {len(experts) for experts in _layers(built).values()} != {remaining}:
        return False
    after, before = ({n: p.shape for n, p in m.named_parameters()} for m in (built, model))
    routers = {f"{n}.weight" for n in _routers(model)}
    return all(shape == before.get(n) or n in routers or len(shape) == 1 for n, shape in after.items())


def _layers(model: nn.Module) -> dict[str, Experts]:
    """Return the experts of every layer, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts)}


def _routers(model: nn.Module) -> dict[str, str]:
    """Return the names of all routers, each with the name of its experts."""
    routers: dict[str, str] = {}
    for name in _layers(model):
        parent = name.rpartition(".")[0]
        local_names = routers_of(model.get_submodule(parent))
        routers |= {f"{parent}.{router}": name for router in local_names}
    return routers


@torch.no_grad()
def compute_saliency(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    report: Report = lambda _: None,
) -> dict[str, Tensor]:
    """Compute the saliency of every expert: the mean over its tokens of router weight times L2 norm of its output.

    arXiv 2510.13999, eq. 9; zero for an expert to which no token was routed.

    Args:
        model: The model.
        windows: Token ids (samples, tokens).
        batch_size: Samples per forward pass.
        report: Called with a progress event after each batch.

    Returns:
        (experts,) float64 of each layer, by the name of its experts.

    Raises:
        ValueError: A saliency is NaN or infinite.
    """
    layers = _layers(model)
    sums = {n: torch.zeros(len(experts), dtype=torch.float64) for n, experts in layers.items()}
    tokens = {n: torch.zeros(len(experts), dtype=torch.float64) for n, experts in layers.items()}
    with _accumulating(layers, sums, tokens):
        run_batches(model, windows, batch_size, report)
    saliencies = {n: sums[n] / tokens[n].clamp(min=1) for n in layers}
    for scores in saliencies.values():
        check_finite(scores, "the activations")
    return saliencies


@contextmanager
def _accumulating(
    layers: Mapping[str, Experts], sums: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add up saliencies and tokens of every expert while the context lasts."""
    pre_hooks: list[tuple[nn.Module, Hook]] = []
    post_hooks: list[tuple[nn.Module, Hook]] = []
    for name, experts in layers.items():
        routed: dict[str, Tensor] = {}

        def record_routes(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routed: dict[str, Tensor] = routed
        ) -> None:
            inputs = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            routed.update(index=inputs["top_k_index"], weights=inputs["top_k_weights"])

        pre_hooks.append((experts, record_routes))
        for number, expert in enumerate(experts):

            def add_saliency(
                _: nn.Module,
                __: Any,
                output: Tensor,
                name: str = name,
                number: int = number,
                routed: dict[str, Tensor] = routed,
            ) -> None:
                # `Experts` passes tokens to an expert in this order.
                gates = routed["weights"][routed["index"] == number]
                sums[name][number] += (gates.double() * output.double().norm(dim=-1)).sum().cpu()
                tokens[name][number] += len(gates)

            post_hooks.append((getattr(expert, experts.names.down), add_saliency))
    with forward_hooks(pre_hooks, before=True, with_kwargs=True), forward_hooks(post_hooks):
        yield


def _remove_experts(model: PreTrainedModel, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove dropped experts from parameters and buffers, and their entries in the router and other tensors."""
    tensors, layers = tensors_of(model), _layers(model)
    out: dict[str, Tensor] = {}
    new_numbers = {n: {int(old): i for i, old in enumerate(k)} for n, k in numbers.items()}
    routers = _routers(model)
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        inside = next((n for n in layers if name.startswith(f"{n}.")), None)
        if inside:
            number, _, rest = name.removeprefix(f"{inside}.").partition(".")
            if int(number) in new_numbers[inside]:
                out[f"{inside}.{new_numbers[inside][int(number)]}.{rest}"] = tensor
            continue
        # Rows of the router, and other tensors with one number per expert (a load-balancing bias).
        beside = next((n for n in layers if name.startswith(f"{n.rpartition('.')[0]}.")), None)
        owner = routers.get(path) or (beside if tensor.dim() == 1 else None)
        count = len(layers[owner]) if owner else -1
        out[name] = tensor[numbers[owner].to(tensor.device)] if owner and len(tensor) == count else tensor
    return out
