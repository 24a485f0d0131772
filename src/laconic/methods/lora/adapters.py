"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) beside frozen linears: W + scale * B A.

A pruned linear is trained through its mask: the product is with W + scale * M o (B A), M being 1 where W is not zero.
That is the weight that will be merged, so the zeros cost nothing of what was learnt. No engine masks adapters beside
the weights; these are trained without a mask, as they will be served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.methods.lora.nf4 import Nf4, quantize_nf4
from laconic.runtime.adapters import LoraLinear
from laconic.runtime.linear import QLinear

Decode = Callable[[torch.dtype], Tensor]
"""Returns the frozen weight (out, in) in a dtype; codes are decoded in every call."""


class Nf4Linear(nn.Module):
    """A frozen linear whose weight is in NF4, and decoded in every forward and backward pass."""

    codes: Tensor
    scales: Tensor
    coarse: Tensor
    mean: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        nf4 = quantize_nf4(linear.weight.detach())
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name in ("codes", "scales", "coarse", "mean"):
            # Not persistent: accelerate would shard them among processes, as it shards weights (FSDP).
            self.register_buffer(name, getattr(nf4, name), persistent=False)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, (out, in).

        Args:
            dtype: of the result.
        """
        shape = (self.out_features, self.in_features)
        return Nf4(self.codes, self.scales, self.coarse, self.mean, shape).decode(dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return frozen_product(x.to(dtype), self.decode, bias)


class AdaptedLinear(LoraLinear):
    """A frozen linear with an adapter that is trained.

    Attributes:
        packed_mask: uint8, one bit per weight, set where the weight may change; None where all may.
    """

    packed_mask: Tensor | None

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, *, masked: bool) -> None:
        super().__init__(base, rank, alpha / rank)
        self.dropout = dropout
        packed_mask = None
        if masked:
            assert isinstance(base, nn.Linear)
            mask = base.weight.detach() != 0
            packed_mask = None if mask.all() else _pack(mask)
        self.register_buffer("packed_mask", packed_mask, persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Set the values before training: A is drawn as torch draws a linear's weight, B is zero.

        Args:
            generator: draws A, on the CPU.
        """
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.packed_mask is None:
            # First, since the order of the two products is that in which their gradients of x are added.
            low = self.adapted(dropped)
            return self._frozen(x) + low
        dtype = compute_dtype(x)
        one_product = dropped is x and isinstance(self.base, nn.Linear | Nf4Linear)
        y: Tensor = _MaskedProduct.apply(dropped.to(dtype), self.lora_A, self.lora_B, self, one_product)  # type: ignore[no-untyped-call]
        if not one_product:
            return self._frozen(x) + y
        bias = cast("Tensor | None", self.base.bias)
        return y if bias is None else y + bias

    def _frozen(self, x: Tensor) -> Tensor:
        base = self.base
        if isinstance(base, QLinear) and base.dense is None and base.scheme.input_activations is None:
            return frozen_product(x, base.decode, base.bias)
        out: Tensor = base(x)
        return out

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the frozen weight, (out, in).

        Args:
            dtype: of the result.
        """
        base = self.base
        return base.weight.to(dtype) if isinstance(base, nn.Linear) else base.decode(dtype)  # type: ignore[operator]

    def mask(self) -> Tensor:
        """Return the mask of the weights that may change, (out, in) bool."""
        shape = (self.out_features, self.in_features)
        return torch.ones(shape, dtype=torch.bool) if self.packed_mask is None else _unpack(self.packed_mask, shape)


def frozen_product(x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
    """Compute a linear whose weight is decoded again in the backward pass, rather than kept in memory.

    Args:
        x: (..., in).
        decode: returns the weight.
        bias: (out,).

    Returns:
        (..., out).
    """
    y: Tensor = _FrozenProduct.apply(x, decode)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Decode) -> Tensor:
        ctx.decode = decode
        return F.linear(x, decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.decode(grads[0].dtype), None


class _MaskedProduct(torch.autograd.Function):
    """Product of x with scale * M o (B A), plus W where one product computes both.

    No tensor of shape (out, in) is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: AdaptedLinear, with_base: bool) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer, ctx.with_base = layer, with_base
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _masked(layer, A, B, x.dtype, with_base))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        layer, dy = ctx.layer, grads[0].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dx = dy @ _masked(layer, A, B, x.dtype, ctx.with_base)
            dW = (dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float()
            dW.mul_(layer.mask()).mul_(layer.scale)
            return dx, B.T @ dW, dW @ A.T, None, None


def _masked(layer: AdaptedLinear, A: Tensor, B: Tensor, dtype: torch.dtype, with_base: bool) -> Tensor:
    change = (B @ A).mul_(layer.scale).mul_(layer.mask())
    return (layer.decode(torch.float32) + change if with_base else change).to(dtype)


def _merged(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W + scale * M o (B A), added in float32, in the dtype of W (out, in). M: 1 where W is not zero."""
    change = (B.float() @ A.float()) * scale
    return torch.where(W != 0, W.float() + change, 0).to(W.dtype)


def add_adapters(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    masked: bool,
    generator: torch.Generator,
    replace_base: Callable[[nn.Linear], nn.Module] | None = None,
) -> dict[str, AdaptedLinear]:
    """Freeze some linears of a model, and put an adapter beside each.

    Args:
        model: changed in place.
        names: full names of the linears.
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        dropout: of their input.
        masked: whether zeros of the weights stay zero.
        generator: draws the initial values.
        replace_base: returns the module that takes the place of a frozen plain linear, with its weight in 4 bits for
            instance.

    Returns:
        The linears with their adapters, by name.
    """
    adapters = {}
    for name in names:
        base = model.get_submodule(name).requires_grad_(False)
        adapted = AdaptedLinear(base, rank, alpha, dropout, masked=masked)
        if replace_base and isinstance(base, nn.Linear):
            adapted.base = replace_base(base)
        adapted.initialize(generator)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted)
        adapters[name] = adapted
    return adapters


@torch.no_grad()
def merge_adapters(model: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    """Add adapters to the dense weights of a model, in place; zeros stay zero.

    Args:
        model: the plain model.
        state: `NAME.lora_A` (rank, in) and `NAME.lora_B` (out, rank) for each linear.
        scale: alpha / rank.
    """
    for name in {n.rpartition(".")[0] for n in state}:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(_merged(weight, state[f"{name}.lora_A"], state[f"{name}.lora_B"], scale))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of x are computed: autocast's if it is enabled.

    Args:
        x: input of a linear.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _pack(mask: Tensor) -> Tensor:
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    bits = packed[:, None] & torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    return (bits != 0).flatten()[: shape[0] * shape[1]].view(shape)
