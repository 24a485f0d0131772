"""Gradients of the loss on calibration text, for stages that hold the model whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.hooks import gradient_hooks


@dataclass(frozen=True)
class Gradients:
    """By parameter. mean: of the loss's gradient over batches. square: mean of its squares, the diagonal of the
    empirical Fisher information; empty unless asked for. Both float32."""

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]


def gradients(
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
    """Gradients of the mean loss of next tokens.

    names: of the parameters. windows: token ids (samples, tokens). checkpointing: keep only the inputs of `blocks`, and
    run each a second time when its gradients are due. Every gradient is added up and freed as soon as it is there.
    """
    device = model.device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    batches = windows.split(batch_size)

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            g = parameter.grad.float() / len(batches)
            mean[name] = mean[name].add_(g) if name in mean else g.clone()
            if squares:
                own = parameter.grad.float().square() / len(batches)
                square[name] = square[name].add_(own) if name in square else own
            parameter.grad = None

        return hook

    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in blocks:
            # Only the block itself is told that it trains, so that nothing in it drops out.
            block.training = True
    try:
        with gradient_hooks((parameter, add(name)) for name, parameter in parameters.items()):
            for i, ids in enumerate(batches):
                ids = ids.to(device)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                report({"event": "work", "done": i + 1, "total": len(batches)})
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval().requires_grad_(False)
    return Gradients(mean, square)
