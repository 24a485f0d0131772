"""Training of a whole model: some of its parameters, on a mix of sequences, on any number of processes.

Batches, learning rates and random numbers are functions of the step and the seed. To resume after a kill a run
therefore needs only the trained parameters and the optimizer's moments, and it comes to the same bytes.
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
from laconic.train.state import (
    Progress,
    State,
    copy_parameters,
    gather,
    load_moments,
    load_parameters,
    read_progress,
    write_progress,
)

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Arguments of the training loop.

    Attributes:
        steps: number of optimizer steps.
        batch_size: sequences that a process takes at once; a step takes this times `gradient_accumulation` times the
            number of processes.
        gradient_accumulation: batches of a process in one step.
        learning_rate: the highest one.
        warmup: share of the steps in which the learning rate rises.
        schedule: how it falls afterwards.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        eval_every: steps between measurements of the held-out loss.
        patience: measurements without a new best after which training stops; None for no limit.
        save_every: steps between saved states.
        bf16: whether products are computed in bfloat16.
        seed: of every random choice.
    """

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

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: number of the step, from 0.
        """
        warmup_steps = math.ceil(self.warmup * self.steps)
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, self.steps - warmup_steps)
        factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * factor[self.schedule]


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        parameters: those of the lowest held-out loss; without held-out text the last ones.
        best_step: their step.
        steps: number of finished steps.
        stopped_early: whether `patience` has ended the training.
        curve: loss per token in nats, learning rate, gradient norm and tokens of each step.
        held_out: step and loss of each measurement of the held-out loss.
    """

    parameters: State
    best_step: int
    steps: int
    stopped_early: bool
    curve: list[dict[str, float]]
    held_out: list[dict[str, float]]


class Diverged(Exception):
    """The loss, or its gradient, is NaN or infinite.

    Attributes:
        step: in which this happened, counted from 1.
        finished_steps: number of steps before it.
        parameters: the last good ones.
        good_step: their step.
    """

    def __init__(self, step: int, finished_steps: int, parameters: State, good_step: int) -> None:
        super().__init__(f"diverged in step {step}")
        self.step, self.finished_steps = step, finished_steps
        self.parameters, self.good_step = parameters, good_step


def finetune(
    model: nn.Module,
    loss: Loss,
    mix: Mix,
    arguments: TrainingArguments,
    *,
    accelerator: Accelerator,
    scratch: Path,
    report: Report = lambda _: None,
) -> Trained:
    """Train the parameters of a model that require a gradient, with AdamW; resume where an earlier run was killed.

    The loss of a step is the mean over all its target tokens, of all processes.

    Args:
        model: trained in place.
        loss: to lower.
        mix: sequences to train on, and held-out ones.
        arguments: how to train.
        accelerator: knows the processes.
        scratch: folder of the saved state.
        report: called with an event after each step.

    Returns:
        The parameters of the lowest held-out loss, or the last ones without held-out text, and the course of the loss.

    Raises:
        Diverged: if the loss or its gradient is NaN or infinite.
        ValueError: if `scratch` holds the state of another training, or a damaged one.
    """
    trainer = _prepare(model, loss, mix, arguments, accelerator)
    order = mix.order(arguments.steps * trainer.step_size)
    progress = trainer.begin(scratch)
    while progress.step < arguments.steps and not progress.stopped(arguments.patience):
        step = progress.step
        numbers = order[step * trainer.step_size : (step + 1) * trainer.step_size]
        figures = trainer.step([mix.at(i) for i in numbers], step)
        if figures is None:
            good_step = progress.best_step if progress.held_out else step - step % arguments.save_every
            raise Diverged(step + 1, step, progress.best_parameters or progress.parameters, good_step)
        progress = replace(progress, step=step + 1, curve=[*progress.curve, figures])
        if progress.step % arguments.eval_every == 0 or progress.step == arguments.steps:
            progress = trainer.evaluate(progress)
        if progress.step % arguments.save_every == 0 or progress.step == arguments.steps:
            progress = trainer.save(progress, scratch)
        held_out = progress.held_out[-1]["loss"] if progress.held_out else None
        event = {"event": "train", "step": step + 1, "steps": arguments.steps, "loss": figures["loss"]}
        report(event | {"held_out": held_out})
    best_step = progress.best_step if progress.held_out else progress.step
    stopped_early = progress.step < arguments.steps
    best = progress.best_parameters or progress.parameters
    return Trained(best, best_step, progress.step, stopped_early, progress.curve, progress.held_out)


def _prepare(
    model: nn.Module, loss: Loss, mix: Mix, arguments: TrainingArguments, accelerator: Accelerator
) -> _Trainer:
    """Wrap a model and its optimizer as accelerate needs them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable, lr=0.0, weight_decay=arguments.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, adamw)
    parameters = {n: p for n, p in accelerator.unwrap_model(wrapped).named_parameters() if p.requires_grad}
    return _Trainer(wrapped, loss, mix, arguments, accelerator, optimizer, parameters)


@dataclass(frozen=True)
class _Trainer:
    """Steps and measurements of one training.

    Attributes:
        model: as accelerate wraps it.
        loss: to lower.
        mix: of sequences.
        arguments: how to train.
        accelerator: knows the processes.
        optimizer: as accelerate wraps it.
        parameters: trained ones, by name.
    """

    model: nn.Module
    loss: Loss
    mix: Mix
    arguments: TrainingArguments
    accelerator: Accelerator
    optimizer: Any
    parameters: Mapping[str, nn.Parameter]

    @property
    def step_size(self) -> int:
        """Number of sequences of a step, of all processes."""
        processes: int = self.accelerator.num_processes
        return self.arguments.batch_size * self.arguments.gradient_accumulation * processes

    def begin(self, scratch: Path) -> Progress:
        """Return the progress of an interrupted run, its state loaded, or that before the first step."""
        # The first process checks the files of an earlier run; the others read them only afterwards.
        self.accelerator.wait_for_everyone()
        identity = {"data": self.mix.sha256, "steps": self.arguments.steps, "sequences_a_step": self.step_size}
        progress = read_progress(scratch, identity)
        if progress is None:
            return self.evaluate(Progress(identity, parameters=copy_parameters(self.parameters)))
        self.load(progress)
        return progress

    def step(self, examples: Sequence[Example], step: int) -> dict[str, float] | None:
        """Make one step and return its figures; None, and no step, if the loss or its gradient is not finite."""
        arguments, accelerator = self.arguments, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = arguments.learning_rate_at(step)
        tokens = sum(e.targets for e in examples)
        batches = _batches(examples, arguments.batch_size)[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            # Random numbers depend on these alone, so that a resumed run draws the same ones.
            torch.manual_seed(hash((arguments.seed, step, number, accelerator.process_index)) % 2**63)
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                batch_loss = self._loss(batch)
                # Gradients are averaged over processes; the loss is a mean over the tokens of all of them.
                accelerator.backward(batch_loss * (accelerator.num_processes / tokens))
            total += batch_loss.detach()
        mean = float(accelerator.reduce(total, "sum")) / tokens
        parameters, limit = list(self.parameters.values()), arguments.max_grad_norm or math.inf
        norm = float(gather(accelerator.clip_grad_norm_(parameters, limit)))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            return None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = arguments.learning_rate_at(step)
        return {"step": step + 1, "loss": mean, "learning_rate": rate, "grad_norm": norm, "tokens": tokens}

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> Progress:
        """Return the progress with the held-out loss added, and with the parameters if the loss is the lowest so far.

        Raises:
            Diverged: if the loss is not finite.
        """
        examples, accelerator = self.mix.held_out, self.accelerator
        if not examples:
            return progress
        training_modules = [m for m in self.model.modules() if m.training]
        self.model.eval()
        batches = _batches(examples, self.arguments.batch_size)
        total = torch.zeros((), device=accelerator.device)
        # Every process runs the model equally often, since all of them gather sharded parameters together.
        for first in range(0, len(batches), accelerator.num_processes):
            index = first + accelerator.process_index
            total += self._loss(batches[min(index, len(batches) - 1)]) * (index < len(batches))
        for module in training_modules:
            module.training = True
        mean = float(accelerator.reduce(total, "sum")) / sum(e.targets for e in examples)
        if not math.isfinite(mean):
            parameters = progress.best_parameters or copy_parameters(self.parameters)
            raise Diverged(progress.step, progress.step, parameters, progress.best_step)
        progress = replace(progress, held_out=[*progress.held_out, {"step": progress.step, "loss": mean}])
        if mean <= min(m["loss"] for m in progress.held_out):
            progress = replace(progress, best_step=progress.step, best_parameters=copy_parameters(self.parameters))
        return progress

    def load(self, progress: Progress) -> None:
        """Set parameters and moments to those of a saved progress."""
        load_parameters(self.parameters, progress.parameters)
        load_moments(self.optimizer.optimizer, self.parameters, progress.moments)

    def save(self, progress: Progress, scratch: Path) -> Progress:
        """Return the progress with the present parameters and moments; the first process writes it."""
        state = self.optimizer.optimizer.state
        moments = [{k: gather(v) for k, v in state[p].items()} for p in self.parameters.values()]
        progress = replace(progress, parameters=copy_parameters(self.parameters), moments=moments)
        if self.accelerator.is_main_process:
            write_progress(scratch, progress)
        return progress

    def _loss(self, batch: Sequence[Example]) -> Tensor:
        ids, loss_mask = (t.to(self.accelerator.device) for t in collate(batch))
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.arguments.bf16):
            return self.loss(self.model, ids, loss_mask)


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def wrap_each_block(plugin: FullyShardedDataParallelPlugin, block: nn.Module) -> None:
    """Let FSDP shard a model block by block, unless the launch sets a policy.

    Sharded as one module, the whole model would be gathered for each pass.

    Args:
        plugin: accelerate's settings of FSDP.
        block: one of the model's blocks.
    """
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = [type(block).__name__]


@contextmanager
def recompute_activations(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the activations of blocks in the backward pass, within the context (gradient checkpointing).

    Args:
        blocks: decoder blocks, of which only the inputs are kept in memory for the backward pass.

    Yields:
        Nothing; the blocks compute as before when the context ends.
    """

    def checkpointed(block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)

    with patched_forwards((block, checkpointed(block)) for block in blocks):
        yield
