"""Training a whole model: some of its parameters, on a mix of sequences, on as many processes as were launched.

Batches, learning rates and random numbers are functions of the step and the seed. What a run needs to go on after a
kill is therefore the trained parameters and the optimizer's moments, and it comes to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.checkpoint import checkpoint

from laconic.data.mix import Example, Mix, collate
from laconic.structure.hooks import patched_forwards
from laconic.train.losses import Loss
from laconic.train.state import Progress, State, load_moments, load_parameters, read, state_of, whole, write

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingArguments:
    """How training goes. steps: optimizer steps. batch_size: sequences a process takes at once; a step takes that times
    `gradient_accumulation` times the number of processes. warmup: share of the steps in which the learning rate rises.
    patience: measurements of the held-out loss without a new best after which training stops. bf16: products in it."""

    steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup: float
    schedule: Literal["cosine", "linear", "constant"]
    weight_decay: float
    max_grad_norm: float | None
    eval_every: int
    patience: int | None
    save_every: int
    bf16: bool
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * share[self.schedule]


@dataclass(frozen=True)
class Trained:
    """parameters: the best ones, by held-out loss (the last ones, where nothing was held out). curve: of each step the
    loss a token, learning rate and norm of the gradient. held_out: of each measurement its step and loss."""

    parameters: State
    best_step: int
    steps: int
    stopped_early: bool
    curve: list[dict[str, float]]
    held_out: list[dict[str, float]]


class Diverged(Exception):
    """The loss, or its gradient, is NaN or infinity. moved: steps that had been made by then. parameters: the last good
    ones, of the step `good`."""

    def __init__(self, step: int, steps_made: int, parameters: State, good: int) -> None:
        super().__init__(f"diverged in step {step}")
        self.step, self.steps_made, self.parameters, self.good = step, steps_made, parameters, good


def finetune(
    model: nn.Module,
    loss: Loss,
    mix: Mix,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    scratch: Path,
    report: Report = lambda _: None,
) -> Trained:
    """Train the parameters of `model` that want a gradient, with AdamW; go on where a run before was killed.

    The loss of a step is the mean over all its target tokens, on whichever process they are.
    Raises: Diverged; ValueError where `scratch` holds the state of another training.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(trained, lr=0.0, weight_decay=arguments.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, made)
    parameters = {n: p for n, p in accelerator.unwrap_model(wrapped).named_parameters() if p.requires_grad}
    one_step = arguments.batch_size * arguments.gradient_accumulation * accelerator.num_processes
    order = mix.order(arguments.steps * one_step)
    # The other processes look at the files of a run before only once the first one has made sure of them.
    accelerator.wait_for_everyone()
    identity = {"data": mix.sha256, "steps": arguments.steps, "sequences_a_step": one_step}
    progress = read(scratch, identity)
    if progress is None:
        first = Progress(identity, parameters=state_of(parameters))
        progress = _measured(wrapped, loss, mix, arguments, accelerator, parameters, first)
    else:
        load_parameters(parameters, progress.parameters)
        load_moments(optimizer.optimizer, parameters, progress.moments)
    while progress.step < arguments.steps and not progress.stopped(arguments.patience):
        step = progress.step
        batch = [mix.at(place) for place in order[step * one_step : (step + 1) * one_step]]
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate(step)
        told = _step(wrapped, loss, batch, arguments, accelerator, optimizer, list(parameters.values()), step)
        if told is None:
            good = progress.best_step if progress.held_out else step - step % arguments.save_every
            raise Diverged(step + 1, step, progress.best_parameters or progress.parameters, good)
        progress = replace(progress, step=step + 1, curve=[*progress.curve, told])
        if progress.step % arguments.eval_every == 0 or progress.step == arguments.steps:
            progress = _measured(wrapped, loss, mix, arguments, accelerator, parameters, progress)
        if progress.step % arguments.save_every == 0 or progress.step == arguments.steps:
            progress = replace(
                progress,
                parameters=state_of(parameters),
                moments=[{k: whole(v) for k, v in optimizer.optimizer.state[p].items()} for p in parameters.values()],
            )
            if accelerator.is_main_process:
                write(scratch, progress)
        held = progress.held_out[-1]["loss"] if progress.held_out else None
        report({"event": "train", "step": step + 1, "steps": arguments.steps, "loss": told["loss"], "held_out": held})
    return Trained(
        progress.best_parameters or progress.parameters,
        progress.best_step if progress.held_out else progress.step,
        progress.step,
        progress.step < arguments.steps,
        progress.curve,
        progress.held_out,
    )


def _step(
    model: nn.Module,
    loss: Loss,
    batch: Sequence[Example],
    arguments: TrainingArguments,
    accelerator: Accelerator,
    optimizer: Any,
    parameters: list[nn.Parameter],
    step: int,
) -> dict[str, float] | None:
    """One step; None, and nothing moved, where loss or gradient is no number."""
    tokens = sum(e.targets for e in batch)
    parts = [batch[i : i + arguments.batch_size] for i in range(0, len(batch), arguments.batch_size)]
    own = parts[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(own):
        # Of these alone random numbers hang, so that a run that goes on draws the same.
        torch.manual_seed(hash((arguments.seed, step, number, accelerator.process_index)) % 2**63)
        last = number == len(own) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            lost = _loss(model, loss, part, arguments, accelerator)
            # Gradients are averaged over processes; the loss is a mean over the tokens of all of them.
            accelerator.backward(lost * (accelerator.num_processes / tokens))
        total += lost.detach()
    mean = float(accelerator.reduce(total, "sum")) / tokens
    norm = float(whole(accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm or math.inf)))
    if not (math.isfinite(mean) and math.isfinite(norm)):
        return None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": step + 1, "loss": mean, "learning_rate": arguments.rate(step), "grad_norm": norm, "tokens": tokens}


def _loss(
    model: nn.Module, loss: Loss, part: Sequence[Example], arguments: TrainingArguments, accelerator: Accelerator
) -> Tensor:
    ids, loss_mask = (t.to(accelerator.device) for t in collate(part))
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=arguments.bf16):
        return loss(model, ids, loss_mask)


@torch.no_grad()
def _measured(
    model: nn.Module,
    loss: Loss,
    mix: Mix,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    parameters: Mapping[str, nn.Parameter],
    progress: Progress,
) -> Progress:
    """The held-out loss as it is now, and the parameters where it is the best so far."""
    if not mix.held_out:
        return progress
    modules = [m for m in model.modules() if m.training]
    model.eval()
    parts = [mix.held_out[i : i + arguments.batch_size] for i in range(0, len(mix.held_out), arguments.batch_size)]
    total = torch.zeros((), device=accelerator.device)
    # Every process as often as the others, since parameters that are cut among them are fetched together.
    for first in range(0, len(parts), accelerator.num_processes):
        mine = first + accelerator.process_index
        lost = _loss(model, loss, parts[min(mine, len(parts) - 1)], arguments, accelerator)
        total += lost * (mine < len(parts))
    for module in modules:
        module.training = True
    mean = float(accelerator.reduce(total, "sum")) / sum(e.targets for e in mix.held_out)
    if not math.isfinite(mean):
        raise Diverged(
            progress.step, progress.step, progress.best_parameters or state_of(parameters), progress.best_step
        )
    progress = replace(progress, held_out=[*progress.held_out, {"step": progress.step, "loss": mean}])
    if mean <= min(m["loss"] for m in progress.held_out):
        progress = replace(progress, best_step=progress.step, best_parameters=state_of(parameters))
    return progress


def wrap_each_block(plugin: FullyShardedDataParallelPlugin, block: nn.Module) -> None:
    """Have FSDP cut a model block by block, unless the launch says how: cut as one it would be gathered whole for each
    pass."""
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = [type(block).__name__]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While this lasts what a block computes is forgotten, and computed again in the backward pass (gradient
    checkpointing)."""

    def again(block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)

    with patched_forwards((block, again(block)) for block in blocks):
        yield
