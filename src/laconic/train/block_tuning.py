"""Tune a block's weights by gradient, so that its output comes close to a target.

This is the loop alone: callers say which tensors are tuned, how weights are made of them and which optimizers step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
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
"""Makes the weights of linears (by name within the block), differentiable in what is tuned."""


class SignSGD(torch.optim.Optimizer):
    """Move every number by the learning rate against the sign of its gradient, within two bounds."""

    def __init__(self, params: Iterable[Any], lr: float, bounds: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "bounds": bounds})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign_(), alpha=group["lr"]).clamp_(*group["bounds"])


@dataclass(frozen=True)
class Tuning:
    """Error of a block's output before and after tuning: the mean squared error on a fixed batch.

    Attributes:
        before: error of the initial weights.
        after: error of the final ones.
    """

    before: float
    after: float

    @property
    def improved(self) -> bool:
        """Whether the error is lower than before."""
        return self.after < self.before

    @property
    def notes(self) -> dict[str, float]:
        """Figures for the log; the initial weights are used where the error has not fallen."""
        return {"loss_before": self.before, "loss_after": self.after if self.improved else self.before}


def tune(
    block: Block,
    weights: Weights,
    optimizers: Sequence[torch.optim.Optimizer],
    targets: Tensor,
    *,
    iters: int,
    batch_size: int,
    activations: Mapping[str, Activations | None] = MappingProxyType({}),
    seed: int = 0,
) -> Tuning:
    """Lower the mean squared error of the block's output; the learning rate falls linearly to zero.

    Args:
        block: the block and the calibration set before it.
        weights: makes the weights of the tuned linears.
        optimizers: one for each tuned tensor, which is stepped as soon as its gradient is complete, and the gradient
            dropped, so that only one of them is in memory.
        targets: (samples, tokens, hidden), the output to come close to.
        iters: number of steps.
        batch_size: samples a step.
        activations: how the inputs of linears are quantized, by name; gradients pass straight through.
        seed: of the order of samples.

    Returns:
        The error before and after, on at most `batch_size` samples at even distances.

    Raises:
        ValueError: for activations from which nothing can be learned: NaN or infinity, or those of an expert to which
            no token was routed.
    """
    block.count_tokens()
    generator = torch.Generator().manual_seed(seed)
    count = len(targets)
    probe = torch.linspace(0, count - 1, min(count, batch_size)).long()
    before = _error(block, weights, targets, probe, activations)
    if not math.isfinite(before):
        raise non_finite_error()
    groups = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    with torch.enable_grad(), _step_in_backward(optimizers), differentiable_codes(block.module, block.dtype):
        for step in range(iters):
            for group, lr in groups:
                group["lr"] = lr * (1 - step / iters)
            batch = torch.randperm(count, generator=generator)[:batch_size]
            loss = _loss(block, weights(), targets, batch, activations)
            # It has no gradient where all tuned linears are of experts to which no token of the batch was routed.
            if loss.requires_grad:
                loss.backward()
    return Tuning(before, _error(block, weights, targets, probe, activations))


@contextmanager
def differentiable_codes(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let gradients through linears that hold codes, within the context.

    Args:
        module: that holds them.
        dtype: of the decoded weights that gradients are computed with.

    Yields:
        Nothing; the linears compute as before when the context ends.
    """

    def through(linear: QLinear, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: _Through.apply(x, linear, weight)  # type: ignore[no-untyped-call]

    rounding = [m for m in module.modules() if isinstance(m, QLinear) and m.scheme.input_activations]
    with patched_forwards((linear, through(linear, linear.decode(dtype))) for linear in rounding):
        yield


class _Through(torch.autograd.Function):
    """The output of a QLinear, with the gradient of its decoded weight: straight through the rounding of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QLinear, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return QLinear.forward(linear, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None, None


@contextmanager
def _step_in_backward(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Step each optimizer in the backward pass, as soon as the gradient of its tensor is complete."""

    def mover(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def move(_: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return move

    tensors = [(p, mover(optimizer)) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    with gradient_hooks(tensors):
        yield


def block_output(block: Block) -> Tensor:
    """Return the block's output for the whole stream, (samples, tokens, hidden), on the stream's device.

    Args:
        block: the block and the calibration set before it.
    """
    output = torch.empty_like(block.stream.hidden)
    for samples, _ in block.stream.numbered_batches():
        output[samples] = block.run(samples).to(output)
    return output


@torch.no_grad()
def _error(
    block: Block, weights: Weights, targets: Tensor, batch: Tensor, activations: Mapping[str, Activations | None]
) -> float:
    return float(_loss(block, weights(), targets, batch, activations))


def _loss(
    block: Block,
    weights: Mapping[str, Tensor],
    targets: Tensor,
    batch: Tensor,
    activations: Mapping[str, Activations | None],
) -> Tensor:
    with replaced_linears(block.module, weights, activations):
        output = block.run(batch)
    return F.mse_loss(output.float(), targets[batch].to(output.device).float())


@contextmanager
def replaced_linears(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    activations: Mapping[str, Activations | None] = MappingProxyType({}),
    outputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[None]:
    """Run a module with other weights in some linears, within the context.

    Args:
        module: that holds the linears.
        weights: by name of the linear, differentiable if need be.
        activations: how the inputs of these linears are quantized, by name.
        outputs: of other linears, by name, which are returned instead of computed.

    Yields:
        Nothing; the linears compute as before when the context ends.
    """

    def with_weight(name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
        linear, acts = linear_at(module, name), activations.get(name)
        return lambda x: half_linear(_round_input(x, acts), weight.to(x.dtype), linear.bias)

    def with_output(output: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda _: output

    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        name: with_weight(name, weight) for name, weight in weights.items()
    }
    forwards |= {name: with_output(output) for name, output in outputs.items()}
    with patched_forwards((module.get_submodule(name), forward) for name, forward in forwards.items()):
        yield


def _round_input(x: Tensor, acts: Activations | None) -> Tensor:
    if acts is None:
        return x
    with torch.no_grad():
        change = (round_activations(x, acts, {}) - x.float()).to(x.dtype)
    return x + change


def freeze_where(tuned: Tensor, where: Tensor) -> Tensor:
    """Set the gradient of some elements of a tuned tensor to zero, so that they keep their value.

    Args:
        tuned: the tensor.
        where: bool, its shape.

    Returns:
        The same tensor.
    """
    if where.any():
        tuned.register_hook(lambda grad: grad.masked_fill(where, 0))
    return tuned


def straight_through(W: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` in value, W in gradient: the straight-through estimator (Bengio et al., arXiv 1308.3432).

    Args:
        W: the tensor that gradients flow to.
        rounded: of the shape of W; no gradient flows through it.
    """
    return W + (rounded - W).detach()


def unstack(module: nn.Module, names: Sequence[str], W: Tensor) -> dict[str, Tensor]:
    """Split stacked rows into the weights of their linears.

    Args:
        module: that holds the linears.
        names: of the linears within the module, in the order of their rows.
        W: (out, in), the rows of all of them.

    Returns:
        Views of W, (rows of the linear, in), by name.
    """
    rows = [linear_at(module, n).out_features for n in names]
    return dict(zip(names, W.split(rows), strict=True))
