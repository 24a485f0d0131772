"""Mixtures of experts with a linear for each expert and projection, where transformers stacks them in a few tensors.

transformers stores all experts of a layer in gate_up_proj (E, 2 I, H) and down_proj (E, H, I); both may be transposed,
gate and up may alternate, and there may be biases, or no gate. Engines have one linear each; their names are taken from
transformers' conversion between the two, where it has one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from laconic.structure.stacking import BIAS, DOWN, GATE_UP, UP, Projections, Stacking


class Experts(nn.ModuleList):
    """Experts of a layer, with separate linears for each expert.

    Attributes:
        num_experts: Number of experts.
        intermediate: Width of an expert.
        hidden: Width of the model.
        stacking: How transformers and checkpoints stack them.
        every_token: Whether hooks of an expert's linears see every token, not only those routed to it. The output of
            the layer is the same, bit for bit.

    Args:
        stacked: The module of transformers that holds the stacked experts; it loses its parameters.
        stacking: How it stacks them.
    """

    def __init__(self, stacked: nn.Module, stacking: Stacking) -> None:
        down = stacked.get_parameter(DOWN)
        count, *sizes = down.shape
        intermediate, hidden = sizes if stacking.transposed else reversed(sizes)
        super().__init__(nn.Module() for _ in range(count))
        self.num_experts, self.intermediate, self.hidden = count, intermediate, hidden
        self.stacking, self.every_token = stacking, False
        for expert in self:
            for name in stacking.linears:
                inputs, outputs = (intermediate, hidden) if name == self.names.down else (hidden, intermediate)
                linear = nn.Linear(inputs, outputs, bias=stacking.biased, device=down.device, dtype=down.dtype)
                setattr(expert, name, linear)
        for leaf, _ in list(stacked.named_parameters(recurse=False)):
            delattr(stacked, leaf)
        # In a tuple, so that it is no submodule: its functions are used, and it has no parameters.
        self._stacked = (stacked,)
        act = getattr(stacked, "act_fn", None)
        self._act = (act if _applies_gate_usually(stacked) else None,)

    @property
    def names(self) -> Projections:
        """Names of an expert's linears."""
        return self.stacking.names

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Route tokens to their experts, and sum the weighted outputs.

        Every gate and up projection runs before any down projection, so that one pass observes the inputs of all
        experts' gate and up projections, or of all down projections.

        Args:
            hidden_states: (tokens, H); without routing (experts tokens, H), each expert's tokens after those of the one
                before it.
            *routing: The experts of each token (tokens, k), and their weights (tokens, k).
            **named: The same by name, in this order.

        Returns:
            The shape of `hidden_states`.
        """
        if hidden_states.is_meta:
            return self._trace(hidden_states)
        if not routing and not named:
            return self._run_sorted(hidden_states.view(self.num_experts, -1, self.hidden))
        top_k_index, top_k_weights = (*routing, *named.values())
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

    def _run_sorted(self, tokens: Tensor) -> Tensor:
        """Run each expert on its own tokens, (experts, tokens, H)."""
        every_token, self.every_token = self.every_token, False
        try:
            inner = [self._inner(e, x) for e, x in zip(self, tokens.unbind(0), strict=True)]
            return torch.cat([self._run(e, self.names.down, x) for e, x in zip(self, inner, strict=True)])
        finally:
            self.every_token = every_token

    def _inner(self, expert: nn.Module, x: Tensor) -> Tensor:
        stacked: Any = self._stacked[0]
        if not self.stacking.gated:
            activated: Tensor = stacked.act_fn(self._run(expert, self.names.up, x))
            return activated
        gate, up = self._run(expert, self.names.gate, x), self._run(expert, self.names.up, x)
        if (act := self._act[0]) is not None:
            inner: Tensor = act(gate) * up
            return inner
        both = torch.stack([gate, up], -1).flatten(-2) if self.stacking.interleaved else torch.cat([gate, up], -1)
        gated: Tensor = stacked._apply_gate(both)
        return gated

    def _run(self, expert: nn.Module, name: str, x: Tensor) -> Tensor:
        linear = getattr(expert, name)
        # Hooks of the linear have seen every token already; calling `forward` directly does not run them again.
        out: Tensor = type(linear).forward(linear, x) if self.every_token else linear(x)
        return out

    def _run_every_token(self, hidden_states: Tensor) -> None:
        """Run every expert on every token, for the hooks of its linears."""
        before = self.stacking.linears[:-1]
        for expert in self:
            for name in before:
                getattr(expert, name)(hidden_states)
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
        where: Tells by the name of a layer's first up projection whether to replace that layer.

    Raises:
        ValueError: Experts are stacked in another way.
    """
    stored = _read_stored(model)
    stackings: dict[Any, Stacking | None] = {}
    for path, module in list(model.named_modules()):
        if not _is_stacked(module) or (stored and not where(f"{path}.0.{stored.names.up}")):
            continue
        # Layers of one class and size are stacked alike, and tried once.
        kind = (type(module), tuple(p.shape for p in module.parameters()))
        if kind not in stackings:
            stackings[kind] = _stacking(module, stored) if stored else None
        stacking = stackings[kind]
        if stacking is None:
            raise ValueError(
                f"unsupported architecture '{model.config.model_type}': its experts ({path}) are stored in a "
                "layout that Laconic cannot split into linears"
            )
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(module, stacking))


def unstack_experts_like(block: nn.Module, example: nn.Module) -> None:
    """Replace the stacked experts of a newly built block where another block of its kind has `Experts`.

    Args:
        block: The block, changed in place.
        example: A block with `Experts`.
    """
    for path, experts in example.named_modules():
        if isinstance(experts, Experts):
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Experts(block.get_submodule(path), experts.stacking))


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


@dataclass(frozen=True)
class _Stored:
    """Names and layout of experts in checkpoints, by transformers' conversion."""

    names: Projections
    swapped: bool
    merged: bool


def _stacking(module: nn.Module, stored: _Stored) -> Stacking | None:
    """Find how a module stacks its experts; None if its linears would not compute what it does."""
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    gated, biased = GATE_UP in shapes, f"{DOWN}{BIAS}" in shapes
    stack = GATE_UP if gated else UP
    expected = {stack, DOWN} | ({f"{stack}{BIAS}", f"{DOWN}{BIAS}"} if biased else set())
    if shapes.keys() != expected or len(shapes[DOWN]) != 3 or getattr(module, "has_post_expert_norm", False):
        return None
    count, *sizes = shapes[DOWN]
    usual = (count, sizes[1] * (1 + gated), sizes[0])
    # Where both fit the shape, the class says which.
    transposed = getattr(module, "is_transposed", None)
    transposed = shapes[stack] != usual if transposed is None else transposed
    interleaved = not getattr(module, "is_concatenated", True)
    in_files = transposed != stored.swapped
    merged = stored.merged or type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION
    stacking = Stacking(stored.names, gated, transposed, in_files, interleaved, biased, merged, stored.merged)
    plain = Stacking(stored.names, transposed_in_files=in_files, merged=merged, single=stored.merged)
    known = stacking == plain and shapes[stack] == usual and _applies_gate_usually(module)
    return stacking if known or _computes_alike(module, stacking) else None


def _applies_gate_usually(module: nn.Module) -> bool:
    """Return whether stacked experts multiply the activation function of the gate by up, by transformers' function."""
    gate = getattr(type(module), "_apply_gate", None)
    usual = getattr(gate, "__module__", "transformers.integrations.moe") == "transformers.integrations.moe"
    return usual and isinstance(getattr(module, "act_fn", None), nn.Module)


@torch.no_grad()
def _computes_alike(module: nn.Module, stacking: Stacking) -> bool:
    """Return whether `Experts` compute what the stacked module does, tried with random weights.

    All experts get the same weights, which take the memory of one.
    """
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(module)
    count = len(trial.get_parameter(DOWN))
    weights: dict[str, Tensor] = {}
    for name, old in list(trial.named_parameters(recurse=False)):
        weights[name] = torch.randn(old.shape[1:], generator=generator) / old.shape[-1] ** 0.5
        setattr(trial, name, nn.Parameter(weights[name].expand(old.shape), requires_grad=False))
    try:
        experts = Experts(copy.deepcopy(module), stacking)
        for expert in experts:
            for leaf, weight in weights.items():
                rows = weight.T if stacking.transposed and weight.dim() == 2 else weight
                for piece in stacking.pieces(leaf, experts.intermediate, experts.hidden):
                    part = nn.Parameter(rows[slice(*piece.rows)], requires_grad=False)
                    setattr(expert.get_submodule(piece.linear), piece.leaf, part)
        x = torch.randn(count, experts.hidden, generator=generator)
        index = torch.stack([torch.arange(count), torch.arange(count).flip(0)], 1)
        routing = (index, torch.rand(count, 2, generator=generator))
        forward = inspect.unwrap(type(module).forward)
        arguments = routing if len(inspect.signature(forward).parameters) > 2 else ()
        return torch.allclose(experts(x, *arguments), forward(trial, x, *arguments), rtol=1e-3, atol=1e-4)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _read_stored(model: PreTrainedModel) -> _Stored | None:
    """Read from transformers' conversion how checkpoints hold experts; None when it does what cannot be undone."""
    stored: dict[str, list[str]] = {}
    swapped = False
    for conversion in get_model_conversion_mapping(model):
        if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
            continue
        target = conversion.target_patterns[0].rpartition(".")[2]
        if target not in (GATE_UP, UP, DOWN) or "experts" not in conversion.target_patterns[0]:
            continue
        operations = [type(operation) for operation in conversion.operations]
        if operations == [Transpose]:
            # With this flag it transposes only what has another shape than the model's.
            swapped = not getattr(conversion.operations[0], "check_dims", False)
        elif operations == ([MergeModulelist, Concatenate] if target == GATE_UP else [MergeModulelist]):
            patterns = [p.removesuffix(".weight").removesuffix(r"\.weight") for p in conversion.source_patterns]
            stored[target] = [p.rpartition(".")[2] for p in patterns]
        else:
            return None
    before = stored.get(GATE_UP) or ["gate_proj", *stored.get(UP, ["up_proj"])]
    down = stored.get(DOWN, ["down_proj"])
    return _Stored(Projections(*before, *down), swapped, bool(stored)) if (len(before), len(down)) == (2, 1) else None
