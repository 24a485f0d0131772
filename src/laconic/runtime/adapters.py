"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) beside frozen linears: W + scale * B A.

A linear that was pruned is trained through its mask: what is multiplied is W + scale * M o (B A), M where W is not
zero. That is the weight that will be merged, so nothing of what was learnt is lost when the zeros are put back. No
engine can mask adapters that are kept beside the weights; they are trained as they will be served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.formats.nf4 import Nf4, quantize_nf4
from laconic.runtime.linear import QLinear

Decode = Callable[[torch.dtype], Tensor]
"""The frozen weight (out, in), made anew in each call where it is kept as codes."""


class Nf4Linear(nn.Module):
    """A frozen linear whose weight is held in NF4, and decoded in every pass, forwards and backwards."""

    codes: Tensor
    scales: Tensor
    coarse: Tensor
    mean: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        held = quantize_nf4(linear.weight.detach())
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name in ("codes", "scales", "coarse", "mean"):
            # Not part of the state: accelerate would cut it among processes, as it cuts weights (FSDP).
            self.register_buffer(name, getattr(held, name), persistent=False)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        shape = (self.out_features, self.in_features)
        return Nf4(self.codes, self.scales, self.coarse, self.mean, shape).decode(dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return frozen_product(x.to(dtype), self.decode, bias)


class Adapted(nn.Module):
    """A frozen linear with an adapter. lora_A: (rank, in), lora_B: (out, rank), both float32. keep: the weights that
    may change, as bits, eight a byte; None where that is all of them."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    keep: Tensor | None

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, *, masked: bool) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear | QLinear)
        self.base: nn.Module = base
        device = next(base.parameters()).device
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        keep = None
        if masked:
            assert isinstance(base, nn.Linear)
            free = base.weight.detach() != 0
            keep = None if free.all() else _pack(free)
        self.register_buffer("keep", keep, persistent=False)

    def begin(self, generator: torch.Generator) -> None:
        """Values before any training: A as a linear's own would be drawn, B zero, so that nothing changes yet."""
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.keep is None:
            low = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            out: Tensor = self._frozen(x) + low * self.scale
            return out
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
        """The frozen weight, (out, in)."""
        base = self.base
        return base.weight.to(dtype) if isinstance(base, nn.Linear) else base.decode(dtype)  # type: ignore[operator]

    def mask(self) -> Tensor:
        """Which weights may change, (out, in) bool."""
        shape = (self.out_features, self.in_features)
        return torch.ones(shape, dtype=torch.bool) if self.keep is None else _unpack(self.keep, shape)


def frozen_product(x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
    """x (..., in) by a weight that is made when it is needed and kept by nobody: again in the backward pass."""
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
    """x by scale * M o (B A), with W added to it where one product is to do for both. Of size (out, in) nothing is kept
    for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: Adapted, with_base: bool) -> Tensor:
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


def _masked(layer: Adapted, A: Tensor, B: Tensor, dtype: torch.dtype, with_base: bool) -> Tensor:
    change = (B @ A).mul_(layer.scale).mul_(layer.mask())
    return (layer.decode(torch.float32) + change if with_base else change).to(dtype)


def merged(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale * M o (B A), M where W (out, in) is not zero; added in float32, in W's dtype."""
    change = (B.float() @ A.float()) * scale
    return torch.where(W != 0, W.float() + change, 0).to(W.dtype)


def adapt(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    masked: bool,
    generator: torch.Generator,
    hold: Callable[[nn.Linear], nn.Module] | None = None,
) -> dict[str, Adapted]:
    """Freeze some linears of a model, and put an adapter beside each. masked: whether zeros are to stay zero.
    generator: of what is drawn. hold: how the frozen linear itself is to be held from then on, if not as it is.

    Returns: the adapters, by the linear's name.
    """
    adapters = {}
    for name in names:
        base = model.get_submodule(name).requires_grad_(False)
        adapted = Adapted(base, rank, alpha, dropout, masked=masked)
        if hold and isinstance(base, nn.Linear):
            adapted.base = hold(base)
        adapted.begin(generator)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted)
        adapters[name] = adapted
    return adapters


@torch.no_grad()
def merge(model: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    """Add adapters to the dense weights of a plain model. state: `NAME.lora_A`, `NAME.lora_B`."""
    for name in {n.rpartition(".")[0] for n in state}:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(merged(weight, state[f"{name}.lora_A"], state[f"{name}.lora_B"], scale))


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which a product of x is computed here: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _pack(free: Tensor) -> Tensor:
    bits = F.pad(free.flatten().to(torch.uint8), (0, -free.numel() % 8)).view(-1, 8)
    return (bits * torch.tensor(_BITS, dtype=torch.uint8, device=free.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    bits = packed[:, None] & torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    return (bits != 0).flatten()[: shape[0] * shape[1]].view(shape)
