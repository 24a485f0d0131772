"""Tuning a block's weights by gradient, so that its output comes near to what it should be.

The one training loop: which numbers are tuned, how weights come of them and which optimizer moves them is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.formats.schemes import Activations
from laconic.kernels.half_linear import half_linear
from laconic.runtime.linear import QLinear
from laconic.runtime.products import round_activations
from laconic.solvers.moments import non_finite_error
from laconic.stages.block import Block
from laconic.structure.anatomy import linear_at
from laconic.structure.hooks import gradient_hooks, patched_forwards

Weights = Callable[[], Mapping[str, Tensor]]
"""Makes the weights of some linears (by name within the block), differentiable in what is tuned."""


class SignSGD(torch.optim.Optimizer):
    """Moves every number by the learning rate against the sign of its gradient, and keeps it between two bounds."""

    def __init__(self, params: Iterable[Any], lr: float, bounds: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "bounds": bounds})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign_(), alpha=group["lr"]).clamp_(*group["bounds"])


def tune(
    block: Block,
    weights: Weights,
    optimizers: Sequence[torch.optim.Optimizer],
    targets: Tensor,
    *,
    iters: int,
    batch_size: int,
    acts: Activations | None = None,
    seed: int = 0,
) -> tuple[float, float, bool]:
    """Lower the mean squared error of the block's output; the learning rate falls linearly to zero.

    optimizers: of a tensor each, which is moved as soon as its gradient is there, and the gradient dropped, so that of
    all of them only one is in memory. targets: (samples, tokens, hidden), what the block should put out. acts: how the
    inputs of the linears are rounded; the rounding passes gradients on (straight-through). Returns: the error on a
    fixed batch before and after, and whether it fell.

    Raises: ValueError for activations from which nothing can be learned: NaN or infinity, or those of an expert to
    which no token was routed.
    """
    block.count()
    generator = torch.Generator().manual_seed(seed)
    count = len(targets)
    probe = torch.linspace(0, count - 1, min(count, batch_size)).long()
    before = _error(block, weights, targets, probe, acts)
    if not math.isfinite(before):
        raise non_finite_error()
    groups = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    with torch.enable_grad(), _moved_at_once(optimizers), passing_gradients(block.module, block.dtype):
        for step in range(iters):
            for group, lr in groups:
                group["lr"] = lr * (1 - step / iters)
            picked = torch.randperm(count, generator=generator)[:batch_size]
            loss = _loss(block, weights(), targets, picked, acts)
            # None of it comes of experts to which no token of these samples was routed.
            if loss.requires_grad:
                loss.backward()
    after = _error(block, weights, targets, probe, acts)
    return before, after, after < before


@contextmanager
def passing_gradients(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While this lasts linears that hold codes let gradients through. dtype: of the weights by which these go."""

    def through(linear: QLinear, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: _Through.apply(x, linear, weight)  # type: ignore[no-untyped-call]

    rounding = [m for m in module.modules() if isinstance(m, QLinear) and m.scheme.input_activations]
    with patched_forwards((linear, through(linear, linear.decode(dtype))) for linear in rounding):
        yield


class _Through(torch.autograd.Function):
    """What a QLinear puts out, and the gradient of its decoded weight: straight through the rounding of its input, for
    codes have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QLinear, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return QLinear.forward(linear, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


@contextmanager
def _moved_at_once(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """While this lasts each optimizer steps in the backward pass, when the gradient of its tensor is complete."""

    def mover(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def move(_: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return move

    tensors = [(p, mover(optimizer)) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    with gradient_hooks(tensors):
        yield


def outputs(block: Block, module: nn.Module | None = None) -> Tensor:
    """What the block puts out for the whole stream, (samples, tokens, hidden), on the stream's device."""
    made = torch.empty_like(block.stream.hidden)
    for hidden, into in zip(block.stream.batches(), made.split(block.stream.batch), strict=True):
        into.copy_(block.run(hidden, module))
    return made


@torch.no_grad()
def _error(block: Block, weights: Weights, targets: Tensor, picked: Tensor, acts: Activations | None) -> float:
    return float(_loss(block, weights(), targets, picked, acts))


def _loss(
    block: Block, weights: Mapping[str, Tensor], targets: Tensor, picked: Tensor, acts: Activations | None
) -> Tensor:
    with standing_in(block.module, weights, acts):
        made = block.run(block.stream.hidden[picked])
    return F.mse_loss(made.float(), targets[picked].to(made.device).float())


@contextmanager
def standing_in(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    acts: Activations | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Some linears with other weights, their inputs rounded; and some, quantized perhaps, whose output is known."""

    def with_weight(linear: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: half_linear(_straight_through(x, acts), weight.to(x.dtype), linear.bias)

    def with_output(output: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda _: output

    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        name: with_weight(linear_at(module, name), weight) for name, weight in weights.items()
    }
    forwards |= {name: with_output(output) for name, output in (known or {}).items()}
    with patched_forwards((module.get_submodule(name), forward) for name, forward in forwards.items()):
        yield


def _straight_through(x: Tensor, acts: Activations | None) -> Tensor:
    if acts is None:
        return x
    with torch.no_grad():
        change = (round_activations(x, acts, {}) - x.float()).to(x.dtype)
    return x + change


def hold(tuned: Tensor, where: Tensor) -> Tensor:
    """Let no gradient reach some elements of a tensor that is tuned, so that they stay what they are."""
    if where.any():
        tuned.register_hook(lambda grad: grad.masked_fill(where, 0))
    return tuned


def rounded_through(W: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, W in gradient (the straight-through estimator)."""
    return W + (rounded - W).detach()


def unstack(module: nn.Module, names: Sequence[str], W: Tensor) -> dict[str, Tensor]:
    """Stacked rows as the weights of the linears that they are of, by name."""
    rows = [linear_at(module, n).out_features for n in names]
    return dict(zip(names, W.split(rows), strict=True))
