"""Gradients of the loss of a whole model on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.hooks import gradient_hooks


@dataclass(frozen=True)
class Gradients:
    """Gradients by name of parameter, float32.

    Attributes:
        mean: Mean over batches of the gradient of the loss.
        square: Mean over batches of its squares, the diagonal of the empirical Fisher information; may be empty.
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]


def compute_gradients(
    model: PreTrainedModel,
    names: Sequence[str],
    windows: Tensor,
    *,
    batch_size: int = 1,
    squares: bool = False,
    checkpointing: bool = False,
    blocks: Sequence[nn.Module] = (),
    report: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Gradients:
    """Compute gradients of the mean next-token loss.

    Each gradient is added to its sum and freed as soon as the backward pass has computed it.

    Args:
        model: The model; afterwards it is in evaluation mode and its parameters need no gradient.
        names: Names of the parameters.
        windows: Token ids (samples, tokens).
        batch_size: Samples per gradient.
        squares: Whether to compute the mean of squares too.
        checkpointing: Whether to keep only the inputs of `blocks`, and run each block again in the backward pass.
        blocks: The decoder blocks; needed with `checkpointing`.
        report: Called with a progress event after each batch.

    Returns:
        The means over batches, on the device of each parameter; `square` is empty without `squares`.
    """
    device = model.device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sums = Gradients({}, {})
    batches = windows.split(batch_size)
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in blocks:
            # Checkpointing runs only in training mode; the modules inside stay in evaluation mode, without dropout.
            block.training = True
    try:
        with gradient_hooks((p, _accumulate(sums, name, len(batches), squares)) for name, p in parameters.items()):
            for i, ids in enumerate(batches):
                ids = ids.to(device)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                report({"event": "work", "done": i + 1, "total": len(batches)})
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval().requires_grad_(False)
    return sums


def _accumulate(sums: Gradients, name: str, batches: int, squares: bool) -> Callable[[Tensor], None]:
    """Make the hook that adds a parameter's gradient to its mean, and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        mean, square = sums.mean, sums.square
        g = parameter.grad.float() / batches
        mean[name] = mean[name].add_(g) if name in mean else g.clone()
        if squares:
            g2 = parameter.grad.float().square() / batches
            square[name] = square[name].add_(g2) if name in square else g2
        parameter.grad = None

    return hook
