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

from laconic.checkpoint.files import read_json
from laconic.checkpoint.rebuild import build_empty_model, rebuild_model, tensors_of
from laconic.checkpoint.source import Source
from laconic.runtime.reading import load
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
from laconic.structure.hooks import Hook, forward_hooks, forward_pre_hooks


class Reap(ModelStage):
    """sparsity: share of the experts of every layer that is dropped. batch_size: samples run at once."""

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
        self._keys(read_json(source.folder / "config.json"), model)
        return {}

    def apply(self, task: ModelTask) -> ModelOutcome:
        assert task.windows is not None
        raw = read_json(task.folder / "config.json")
        model = load(task.folder, device=task.device, dtype=torch.float32, trust=task.trust)
        config = self._keys(raw, model)
        scores = saliency(model, task.windows, self.batch_size, task.report)
        left = self._left(model)
        kept = {name: s.argsort(descending=True, stable=True)[:left].sort().values for name, s in scores.items()}
        made = rebuild_model({**raw, **config}, _without(model, kept), torch.float32)
        events = [
            {
                "event": "experts",
                "experts": name,
                "saliency": [float(v) for v in s],
                "dropped": sorted({*range(len(s))} - {*kept[name].tolist()}),
            }
            for name, s in scores.items()
        ]
        return ModelOutcome(made, config, events, {"pruning": {"method": self.method, **parameter_counts(model, made)}})

    def _left(self, model: PreTrainedModel) -> int:
        """How many experts a layer keeps. Raises: ValueError when there are none, or tokens would find too few."""
        layers = _layers(model)
        if not layers:
            raise ValueError("reap drops experts, and this model has none; use llm_pruner or depth")
        counts = {len(experts) for experts in layers.values()}
        if len(counts) > 1:
            raise ValueError("layers of this model differ in the number of experts, which reap cannot prune")
        (count,) = counts
        left = count - round(self.sparsity * count)
        if left == count and self.sparsity:
            raise ValueError(
                f"sparsity {self.sparsity} of {count} experts is less than one; use {1 / count:.4g} or more"
            )
        config = model.config.get_text_config()
        each = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None) or 1
        if left < each:
            raise ValueError(
                f"sparsity {self.sparsity} leaves {left} of {count} experts, and a token goes to {each}; "
                f"at most {(count - each) / count:.4g} can go"
            )
        return left

    def _keys(self, raw: Mapping[str, Any], model: PreTrainedModel) -> dict[str, int]:
        """The keys of config.json that say how many experts there are, with what they say from then on: those with
        which transformers builds so many."""
        left = self._left(model)
        experts = next(iter(_layers(model).values()))
        count = len(experts)
        if left == count:
            return {}
        said = {**raw, **{k: v for k, v in model.config.to_dict().items() if k not in raw}}
        keys = [k for k, v in said.items() if v == count and isinstance(v, int) and not isinstance(v, bool)]
        for some in [*((k,) for k in keys), *combinations(keys, 2)]:
            changed = dict.fromkeys(some, left)
            try:
                built = build_empty_model({**raw, **changed}, model.dtype)
            except ValueError:
                continue
            same = len(_layers(built)) == len(_layers(model)) and _fits(built, model, left)
            if same:
                return changed
        raise ValueError(f"the config of '{model.config.model_type}' has no key for the number of experts")


def _fits(built: PreTrainedModel, model: PreTrainedModel, left: int) -> bool:
    """Whether all is as it was but for the number of experts."""
    if {len(experts) for experts in _layers(built).values()} != {left}:
        return False
    after, before = ({n: p.shape for n, p in m.named_parameters()} for m in (built, model))
    routers = {f"{n}.weight" for n in _routers(model)}
    return all(shape == before.get(n) or n in routers or len(shape) == 1 for n, shape in after.items())


def _layers(model: nn.Module) -> dict[str, Experts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts)}


def _routers(model: nn.Module) -> dict[str, str]:
    """What weighs the experts of a layer, with their name."""
    found: dict[str, str] = {}
    for name in _layers(model):
        parent = name.rpartition(".")[0]
        inside = routers_of(model.get_submodule(parent))
        found |= {f"{parent}.{router}": name for router in inside}
    return found


@torch.no_grad()
def saliency(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 1,
    report: Report = lambda _: None,
) -> dict[str, Tensor]:
    """The mean over an expert's tokens of the weight that the router gives it times the L2 norm of its output
    (arXiv 2510.13999, eq. 9), of each layer (experts,) float64; zero where no token went. windows: token ids (samples,
    tokens). Raises: ValueError where it is no number."""
    layers = _layers(model)
    sums = {n: torch.zeros(len(experts), dtype=torch.float64) for n, experts in layers.items()}
    tokens = {n: torch.zeros(len(experts), dtype=torch.float64) for n, experts in layers.items()}
    with _watching(layers, sums, tokens):
        run_batches(model, windows, batch_size, report)
    found = {n: sums[n] / tokens[n].clamp(min=1) for n in layers}
    for scores in found.values():
        check_finite(scores, "the activations")
    return found


@contextmanager
def _watching(
    layers: Mapping[str, Experts], sums: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
) -> Iterator[None]:
    before: list[tuple[nn.Module, Hook]] = []
    after: list[tuple[nn.Module, Hook]] = []
    for name, experts in layers.items():
        routed: dict[str, Tensor] = {}

        def remember(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routed: dict[str, Tensor] = routed
        ) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            routed.update(index=given["top_k_index"], weights=given["top_k_weights"])

        before.append((experts, remember))
        for number, expert in enumerate(experts):

            def look(
                _: nn.Module,
                __: Any,
                output: Tensor,
                name: str = name,
                number: int = number,
                routed: dict[str, Tensor] = routed,
            ) -> None:
                # An expert is given its tokens in this order.
                gates = routed["weights"][routed["index"] == number]
                sums[name][number] += (gates.double() * output.double().norm(dim=-1)).sum().cpu()
                tokens[name][number] += len(gates)

            after.append((getattr(expert, experts.names.down), look))
    with forward_pre_hooks(before, with_kwargs=True), forward_hooks(after):
        yield


def _without(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers without the experts that are not kept, and without their places beside them."""
    tensors, layers = tensors_of(model), _layers(model)
    out: dict[str, Tensor] = {}
    new = {n: {int(old): i for i, old in enumerate(k)} for n, k in kept.items()}
    routers = _routers(model)
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        inside = next((n for n in layers if name.startswith(f"{n}.")), None)
        if inside:
            number, _, rest = name.removeprefix(f"{inside}.").partition(".")
            if int(number) in new[inside]:
                out[f"{inside}.{new[inside][int(number)]}.{rest}"] = tensor
            continue
        # The router's rows, and whatever else has one figure an expert beside them (a bias that balances loads).
        beside = next((n for n in layers if name.startswith(f"{n.rpartition('.')[0]}.")), None)
        owner = routers.get(path) or (beside if tensor.dim() == 1 else None)
        count = len(layers[owner]) if owner else -1
        out[name] = tensor[kept[owner].to(tensor.device)] if owner and len(tensor) == count else tensor
    return out
