"""Models to time: random ones, copies with zeros, and copies whose linears use sparse kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from laconic.bench.forms import KernelWeight, pack_blocks, pack_cusparselt
from laconic.bench.zeros import Zeros, zeros_of
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.runtime.linear import QLinear
from laconic.structure.anatomy import linears_of

Prune = Callable[[Tensor], Tensor]
"""Maps a weight (out, in) to the same weight with more zeros."""


@dataclass(frozen=True)
class LinearCounts:
    """Sizes of the linears of a model, head included.

    Attributes:
        weights: Number of weights.
        nonzero: Number of nonzero weights.
        nbytes: Bytes that a forward pass reads, in the layout of the kernels.
        sparse: By pattern, the number of linears with a sparse kernel.
    """

    weights: int
    nonzero: int
    nbytes: int
    sparse: Mapping[str, int] = field(default_factory=dict)


class SparseLinear(nn.Module):
    """A linear with a sparse kernel."""

    def __init__(self, weight: KernelWeight, bias: Any) -> None:
        super().__init__()
        self.multiply, self.nbytes, self.bias = weight.multiply, weight.nbytes, bias
        self.weights, self.nonzero = weight.dense.numel(), int(weight.dense.count_nonzero())
        self.out_features = weight.dense.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def random_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, trust: Trust = UNTRUSTED
) -> PreTrainedModel:
    """Make a model with random weights, the same at every call.

    Args:
        config: Config of the model.
        device: Device of its weights.
        dtype: Dtype of its weights.
        trust: Whether code in the model's folder may run.

    Returns:
        The model in evaluation mode, without gradients.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust.remote_code
        )
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def with_zeros(model: PreTrainedModel, prune: Prune) -> PreTrainedModel:
    """Return a copy of a model with pruned linears in its blocks; the head is unchanged.

    Args:
        model: The model; it is not changed.
        prune: Function from a weight (out, in) to a pruned weight of the same shape.
    """
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for linear in linears_of(model).values():
        if linear is not head:
            linear.weight.copy_(prune(linear.weight))
    return model


@torch.no_grad()
def with_sparse_kernels(model: PreTrainedModel, prune: Prune | None = None) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return a copy of a model that uses sparse kernels for the linears whose zeros have a supported pattern.

    2:4 zeros use cuSPARSELt on an NVIDIA GPU, zero blocks use Laconic's kernel.

    Args:
        model: The model.
        prune: Prunes the linears of the blocks first.

    Returns:
        The copy, and by pattern the number of linears with a sparse kernel; without one, the model itself.
    """
    counts: dict[str, int] = {}
    packed: dict[str, KernelWeight] = {}
    # A table of codes is decoded at each look at its weight.
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    weights = _floating_point_weights(model)
    for name, (linear, weight) in weights.items():
        if weight is table:
            continue
        W = weight.detach() if prune is None or linear is head else prune(weight.detach())
        zeros = zeros_of(W)
        if (kernel_weight := _pack(W, zeros)) is not None:
            packed[name] = kernel_weight
            counts[zeros.pattern] = counts.get(zeros.pattern, 0) + 1
    if not packed:
        return model, {}
    # The deep copy skips weights that are replaced, to save memory.
    skipped = {id(weights[n][1]): nn.Parameter(torch.empty(0), False) for n in packed}
    model = copy.deepcopy(model, skipped)
    for name, kernel_weight in packed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SparseLinear(kernel_weight, model.get_submodule(name).bias))
    return model, counts


@torch.no_grad()
def count_weights(model: PreTrainedModel, sparse: Mapping[str, int] | None = None) -> LinearCounts:
    """Count the weights and bytes of the linears of a model.

    Args:
        model: The model, with or without sparse kernels.
        sparse: By pattern, the number of linears with a sparse kernel, as `with_sparse_kernels` returns it.

    Returns:
        Weights, nonzero weights and bytes; a quantized linear counts with its decoded weight.
    """
    weights = nonzero = nbytes = 0
    for module in model.modules():
        if isinstance(module, SparseLinear):
            weights, nonzero, nbytes = weights + module.weights, nonzero + module.nonzero, nbytes + module.nbytes
        elif isinstance(module, nn.Linear | QLinear):
            W = module.weight if isinstance(module, nn.Linear) else module.decode(module.dtype)
            weights, nonzero, nbytes = weights + W.numel(), nonzero + int(W.count_nonzero()), nbytes + W.nbytes
    return LinearCounts(weights, nonzero, nbytes, sparse or {})


def _floating_point_weights(model: PreTrainedModel) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return by name the linears with a floating-point product, and their weights.

    A quantized linear is one of them once its weight is decoded, unless it quantizes its input.
    """
    weights: dict[str, tuple[nn.Module, Tensor]] = {n: (m, m.weight) for n, m in linears_of(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.dense is not None and module.scheme.input_activations is None:
            weights[name] = module, module.dense
    return weights


def _pack(W: Tensor, zeros: Zeros) -> KernelWeight | None:
    """Pack a weight for the sparse kernel of its pattern; None if there is none on this device."""
    try:
        if zeros.pattern == "2:4" and W.is_cuda and W.element_size() == 2:
            return pack_cusparselt(W)
        if zeros.block is not None:
            return pack_blocks(W, zeros.block)
    except (RuntimeError, ValueError):
        pass
    return None
