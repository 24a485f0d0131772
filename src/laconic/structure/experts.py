"""Mixtures of experts with a linear for each expert and projection, where transformers stacks them in two tensors.

transformers stores all experts of a layer in two tensors: gate_up_proj (E, 2 I, H) and down_proj (E, H, I). Checkpoints
and engines have one linear each; their names are taken from transformers' conversion between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Projections(NamedTuple):
    """Names of an expert's linears in checkpoints."""

    gate: str
    up: str
    down: str


class Expert(nn.Module):
    """Linears of one expert, and the activation function of its gate."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act


class Experts(nn.ModuleList):
    """Experts of a layer, with separate linears for each expert.

    Attributes:
        num_experts: Number of experts.
        intermediate: Width of an expert.
        names: Names of an expert's linears.
        every_token: Whether hooks of an expert's linears see every token, not only those routed to it. The output of
            the layer is the same, bit for bit.

    Args:
        stacked: The module of transformers that holds the stacked experts.
        names: Names of an expert's linears.
    """

    def __init__(self, stacked: nn.Module, names: Projections) -> None:
        down, act = stacked.get_parameter(DOWN), stacked.get_submodule("act_fn")
        count, hidden, intermediate = down.shape
        super().__init__(Expert(act) for _ in range(count))
        self.num_experts, self.intermediate = count, intermediate
        self.names, self.every_token = names, False
        shapes = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        for expert in self:
            for name, (inputs, outputs) in zip(names, shapes, strict=True):
                setattr(expert, name, nn.Linear(inputs, outputs, bias=False, device=down.device, dtype=down.dtype))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route tokens to their experts, and sum the weighted outputs.

        Every gate and up projection runs before any down projection, so that one pass observes the inputs of all
        experts' gate and up projections, or of all down projections.

        Args:
            hidden_states: (tokens, H).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), their weights.

        Returns:
            (tokens, H).
        """
        if hidden_states.is_meta:
            return self._trace(hidden_states)
        if self.every_token:
            self._run_every_token(hidden_states)
        routes = [torch.where(top_k_index == i) for i in range(self.num_experts)]
        routed = [(e, token, k) for e, (token, k) in zip(self, routes, strict=True) if len(token)]
        inner = [self._inner(e, hidden_states[token]) for e, token, _ in routed]
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        # One slot per product, summed in a fixed order: adding in place has no fixed order on a GPU.
        out = torch.zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=dtype, device=hidden_states.device)
        for (e, token, k), x in zip(routed, inner, strict=True):
            out[token, k] = self._run(e, self.names.down, x) * top_k_weights[token, k, None]
        return out.sum(1).to(hidden_states.dtype)

    def _inner(self, expert: Any, x: Tensor) -> Tensor:
        gate, up = self._run(expert, self.names.gate, x), self._run(expert, self.names.up, x)
        inner: Tensor = expert.act(gate) * up
        return inner

    def _run(self, expert: nn.Module, name: str, x: Tensor) -> Tensor:
        linear = getattr(expert, name)
        # Hooks of the linear have seen every token already; calling `forward` directly does not run them again.
        out: Tensor = type(linear).forward(linear, x) if self.every_token else linear(x)
        return out

    def _run_every_token(self, hidden_states: Tensor) -> None:
        """Run every expert on every token, for the hooks of its linears."""
        for expert in self:
            getattr(expert, self.names.gate)(hidden_states)
            getattr(expert, self.names.up)(hidden_states)
        for expert in self:
            getattr(expert, self.names.down)(self._inner(expert, hidden_states))

    def _trace(self, hidden_states: Tensor) -> Tensor:
        """Run every expert on its own view of the input, as tracing needs; meta tensors have no values to route by."""
        inner = [self._inner(e, hidden_states.view_as(hidden_states)) for e in self]
        for expert, x in zip(self, inner, strict=True):
            self._run(expert, self.names.down, x)
        return torch.empty_like(hidden_states)


def unstack_experts(model: PreTrainedModel, where: Callable[[str], bool] = lambda _: True) -> None:
    """Replace the stacked experts of a model by `Experts` modules.

    Args:
        model: The model, changed in place.
        where: Tells by the name of a layer's first gate linear whether to replace that layer.

    Raises:
        ValueError: Experts are stacked in another way.
    """
    names = _stored_names(model)
    for path, module in list(model.named_modules()):
        if not _is_stacked(module) or (names and not where(f"{path}.0.{names.gate}")):
            continue
        if names is None or not _is_known(module):
            raise ValueError(
                f"unsupported architecture '{model.config.model_type}': its experts ({path}) are stored in a "
                "layout that Laconic cannot split into linears"
            )
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(module, names))


def unstack_experts_like(block: nn.Module, example: nn.Module) -> None:
    """Replace the stacked experts of a newly built block where another block of its kind has `Experts`.

    Args:
        block: The block, changed in place.
        example: A block with `Experts`.
    """
    for path, experts in example.named_modules():
        if isinstance(experts, Experts):
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Experts(block.get_submodule(path), experts.names))


@contextmanager
def calibrate_all_experts(*modules: nn.Module) -> Iterator[None]:
    """Let hooks of every expert's linears see every token while the context lasts, not only the routed ones.

    Args:
        *modules: Modules that contain `Experts`, at any depth.
    """
    experts = [m for module in modules for m in module.modules() if isinstance(m, Experts)]
    for m in experts:
        m.every_token = True
    try:
        yield
    finally:
        for m in experts:
            m.every_token = False


def enclosing_experts(module: nn.Module, linear: str) -> str | None:
    """Return the name of the `Experts` module that contains a linear, or None.

    Args:
        module: The module in which both have their names.
        linear: Name of the linear.
    """
    parts = linear.split(".")
    above = (".".join(parts[:i]) for i in range(len(parts)))
    return next((n for n in above if isinstance(module.get_submodule(n), Experts)), None)


def routers_of(module: nn.Module) -> set[str]:
    """Find modules beside experts that weigh them or a shared expert, by name; engines keep them uncompressed.

    Args:
        module: A module that contains `Experts`, at any depth.

    Returns:
        Names within the module.
    """
    routers = set()
    for path, experts in module.named_modules():
        if isinstance(experts, Experts):
            beside = path.rpartition(".")[0]
            for name, m in module.get_submodule(beside).named_modules():
                weight = getattr(m, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) in (1, experts.num_experts):
                    full = f"{beside}.{name}" if beside else name
                    if not full.startswith(f"{path}."):
                        routers.add(full)
    return routers


def _is_stacked(module: nn.Module) -> bool:
    """Return whether a module stores several experts in one tensor."""
    matrices = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return bool(matrices) and not isinstance(module, _ConvNd) and hasattr(module, "num_experts")


def _is_known(module: nn.Module) -> bool:
    """Return whether stacked experts are a concatenated gate and up, and down, without bias and not transposed."""
    parameters = {n: tuple(p.shape) for n, p in module.named_parameters()}
    if parameters.keys() != {GATE_UP, DOWN} or len(parameters[DOWN]) != 3:
        return False
    experts, hidden, intermediate = parameters[DOWN]
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    usual = all(getattr(module, flag, value) == value for flag, value in flags.items())
    gate = getattr(type(module), "_apply_gate", None)
    return (
        parameters[GATE_UP] == (experts, 2 * intermediate, hidden)
        and usual
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(gate, "__module__", "transformers.integrations.moe") == "transformers.integrations.moe"
        and isinstance(getattr(module, "act_fn", None), nn.Module)
    )


def _stored_names(model: PreTrainedModel) -> Projections | None:
    """Read the names of an expert's linears from transformers' conversion; None when that does more than stack them."""
    stored: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) == 1:
            target = conversion.target_patterns[0].rpartition(".")[2]
            if target in (GATE_UP, DOWN) and "experts" in conversion.target_patterns[0]:
                expected = [MergeModulelist, Concatenate] if target == GATE_UP else [MergeModulelist]
                if [type(operation) for operation in conversion.operations] != expected:
                    return None
                patterns = [p.removesuffix(".weight").removesuffix(r"\.weight") for p in conversion.source_patterns]
                stored[target] = [p.rpartition(".")[2] for p in patterns]
    gate_up, down = stored.get(GATE_UP, ["gate_proj", "up_proj"]), stored.get(DOWN, ["down_proj"])
    return Projections(*gate_up, *down) if (len(gate_up), len(down)) == (2, 1) else None
