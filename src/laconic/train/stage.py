"""Stages that train a whole model: what they train on, against which loss, and for how long.

LoRA, distillation and quantization-aware training differ in which parameters are trained and in what they leave: these
are the methods that a subclass adds. The loop itself is `train.finetune`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from laconic.checkpoint.source import (
    Source,
    build_skeleton,
    check_tokens,
    load_tokenizer,
    model_folder,
    read_config,
)
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.data.mix import Mix, TextSource, describe_mix, read_mix
from laconic.runtime.reading import load
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from laconic.stages.stage import Needs
from laconic.structure.anatomy import Anatomy, dissect
from laconic.structure.experts import Experts
from laconic.train.finetune import (
    Diverged,
    Trained,
    TrainingArguments,
    finetune,
    recompute_activations,
    wrap_each_block,
)
from laconic.train.losses import Loss, distillation_loss, language_loss
from laconic.train.ranks import is_main, world_size
from laconic.train.state import State


@dataclass(frozen=True)
class TrainingRun:
    """A training, before its model is loaded.

    Attributes:
        task: of the stage.
        config: the model's config, without its quantization.
        skeleton: of the model, on the meta device.
        anatomy: of the model.
        quantized: whether the checkpoint holds codes.
        arguments: of the loop.
        accelerator: accelerate's, which knows the processes.
        contexts: contexts that stay open while the model is trained.
    """

    task: ModelTask
    config: Any
    skeleton: PreTrainedModel
    anatomy: Anatomy
    quantized: bool
    arguments: TrainingArguments
    accelerator: Accelerator
    contexts: ExitStack

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of frozen weights that are not codes."""
        return torch.bfloat16 if self.arguments.bf16 else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of this process; there is only one CPU, though accelerate numbers them."""
        return torch.device("cpu") if self.accelerator.device.type == "cpu" else self.accelerator.device

    @property
    def load_device(self) -> torch.device:
        """Device that the model is loaded on: under FSDP the CPU, since a process gets its part of the whole model.

        Raises:
            ValueError: for FSDP's first version.
        """
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return self.device
        if not self.accelerator.is_fsdp2:
            raise ValueError("FSDP's first version cannot train adapters beside frozen weights; use --fsdp_version 2")
        return torch.device("cpu")


class TrainingStage(ModelStage):
    """A stage that trains parameters of the whole model on a mix of texts.

    Attributes:
        data: texts and instructions to train on.
        loss: `lm`, cross-entropy of the text; `kl`, KL divergence from a teacher's predictions.
        teacher: a folder or Hub name; the recipe's original model if not given.
        learning_rate: the highest learning rate, after warmup.
        warmup: share of the steps in which the learning rate rises.
        schedule: how the learning rate falls after warmup.
        epochs: passes over the data.
        max_steps: number of steps, in place of epochs.
        batch_size: sequences a process takes at once.
        gradient_accumulation: batches a step.
        max_seq_length: tokens of a sequence.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm; null for no clipping.
        gradient_checkpointing: recompute activations of blocks in the backward pass.
        precision: precision of products; `auto` is bf16 where a GPU has it.
        held_out: share of each text that is not trained on.
        held_out_samples: at most so many held-out sequences.
        eval_every: steps between measurements of the held-out loss.
        patience: measurements without a new best after which training stops.
        save_every: steps between saved states.
    """

    data: tuple[TextSource, ...] = Field(min_length=1)
    loss: Literal["lm", "kl"] = "lm"
    teacher: str | None = None
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.03, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    max_seq_length: int = Field(1024, ge=2)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float | None = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    held_out: float = Field(0.05, ge=0, lt=1)
    held_out_samples: int = Field(64, ge=1)
    eval_every: int = Field(50, ge=1)
    patience: int | None = Field(None, ge=1)
    save_every: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _measured(self) -> TrainingStage:
        if self.patience is not None and not self.held_out:
            raise ValueError("patience counts measurements of the held-out loss; set held_out, or leave patience out")
        return self

    @property
    def needs(self) -> Needs:
        return Needs(gradients=True)

    @abstractmethod
    def open_model(self, run: TrainingRun) -> PreTrainedModel:
        """Load the model, its trained parameters requiring gradients and all others not.

        Args:
            run: the training.

        Returns:
            The model, on `run.load_device`.

        Raises:
            ValueError: if the checkpoint, or a file that training begins from, cannot be read.
        """

    @abstractmethod
    def outcome(self, run: TrainingRun, parameters: State, results: Mapping[str, dict[str, Any]]) -> ModelOutcome:
        """Return what the stage leaves, once training has ended. Called in the first process of a launch.

        Args:
            run: the training.
            parameters: the best trained parameters, by name.
            results: for `results/`.
        """

    @abstractmethod
    def keep_last_good(self, run: TrainingRun, diverged: Diverged) -> str:
        """Keep the last good parameters of a diverged training in a folder that the next run does not clear.

        Args:
            run: the training.
            diverged: the last good parameters and their step.

        Returns:
            What the user should do, for the message.
        """

    def prepare_run(self, run: TrainingRun) -> None:
        """Check what depends on the earlier stages' output, before the model is loaded.

        Args:
            run: the training.

        Raises:
            ValueError: if the model cannot be trained.
        """

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        if self.teacher:
            self._check_teacher(source)
        elif self.loss == "kl" and source.checkpoint.pickled:
            raise ValueError(
                "loss: kl opens the original model too, and reads no pickle weights; convert them to safetensors first "
                "(transformers' save_pretrained writes those)"
            )
        limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        if limit and self.max_seq_length > limit:
            raise ValueError(
                f"max_seq_length {self.max_seq_length} is longer than the model's context of {limit}; lower it"
            )
        mix = self._read_mix(source.folder, source.config.get_text_config().vocab_size, 0)
        self._count_steps(mix)
        return {"data": mix.sha256}

    def apply(self, task: ModelTask) -> ModelOutcome:
        start = time.monotonic()
        raw, config = read_config(task.folder, trust=task.trust)
        mix = self._read_mix(task.folder, config.get_text_config().vocab_size, task.seed, task.trust)
        with ExitStack() as contexts:
            # Codes of the original model are decoded; those of an earlier stage stay.
            coded = "quantization_config" in raw and task.folder != task.original
            run = self._start(task, config, coded, self._arguments(mix, task), contexts)
            self.prepare_run(run)
            model = self.open_model(run)
            blocks = model.get_submodule(run.anatomy.blocks)
            if self.gradient_checkpointing:
                contexts.enter_context(recompute_activations(list(blocks.children())))
            contexts.enter_context(torch.enable_grad())
            try:
                loss = self._loss(run)
                trained = finetune(
                    model,
                    loss,
                    mix,
                    run.arguments,
                    accelerator=run.accelerator,
                    scratch=task.scratch,
                    report=task.report,
                )
            except Diverged as e:
                raise ValueError(self._divergence(run, e)) from e
            del model, blocks, loss
        results = {f"training-{self.method}": self._results(run, trained, mix, time.monotonic() - start)}
        if not is_main():
            return ModelOutcome(None)
        return self.outcome(run, trained.parameters, results)

    def _start(
        self, task: ModelTask, config: Any, quantized: bool, arguments: TrainingArguments, contexts: ExitStack
    ) -> TrainingRun:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        skeleton = build_skeleton(config, torch.bfloat16, trust=task.trust)
        anatomy = dissect(skeleton)
        mixture = any(isinstance(m, Experts) for m in skeleton.modules())
        accelerator = Accelerator(
            cpu=task.device.type == "cpu",
            # No token may have been routed to an expert.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=mixture)],
        )
        if accelerator.distributed_type == DistributedType.FSDP:
            wrap_each_block(accelerator.state.fsdp_plugin, next(skeleton.get_submodule(anatomy.blocks).children()))
        return TrainingRun(task, config, skeleton, anatomy, quantized, arguments, accelerator, contexts)

    def _loss(self, run: TrainingRun) -> Loss:
        if self.loss == "lm":
            return language_loss
        teacher = load(
            self.teacher or run.task.original,
            device=run.device,
            dtype=run.dtype,
            adapter=self.teacher is not None,
            trust=run.task.trust,
        )
        return distillation_loss(teacher)

    def _check_teacher(self, source: Source) -> None:
        if self.loss != "kl":
            raise ValueError("teacher goes with loss: kl; set that, or leave it out")
        _, config = read_config(model_folder(str(self.teacher)))
        size, teacher_size = (c.get_text_config().vocab_size for c in (source.config, config))
        if size != teacher_size:
            raise ValueError(
                f"teacher {self.teacher} has {teacher_size} tokens, the model {size}; name one of the same tokenizer"
            )

    def _read_mix(self, folder: Path, vocabulary: int, seed: int, trust: Trust = UNTRUSTED) -> Mix:
        mix = read_mix(
            self.data,
            load_tokenizer(folder, trust=trust),
            length=self.max_seq_length,
            held_out=self.held_out,
            held_out_samples=self.held_out_samples,
            seed=seed,
        )
        check_tokens(mix.highest, vocabulary, folder)
        return mix

    def _count_steps(self, mix: Mix) -> int:
        batch = self.batch_size * self.gradient_accumulation * world_size()
        sequences = sum(len(p) for p in mix.parts)
        if sequences < batch:
            raise ValueError(
                f"data gives {sequences} sequences to train on, less than one batch of {batch} (batch_size x "
                "gradient_accumulation x processes); give more, or lower batch_size or max_seq_length"
            )
        return self.max_steps or max(1, self.epochs * mix.epoch // batch)

    def _arguments(self, mix: Mix, task: ModelTask) -> TrainingArguments:
        bf16 = self.precision == "bf16" or (
            self.precision == "auto" and task.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return TrainingArguments(
            steps=self._count_steps(mix),
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            eval_every=self.eval_every,
            patience=self.patience,
            save_every=self.save_every,
            bf16=bf16,
            seed=task.seed,
        )

    def _results(self, run: TrainingRun, trained: Trained, mix: Mix, seconds: float) -> dict[str, Any]:
        """Return how the training went, for `results/`."""
        arguments, processes = run.arguments, run.accelerator.num_processes
        sequences = arguments.batch_size * arguments.gradient_accumulation * processes
        return {
            "loss": self.loss,
            "steps": trained.steps,
            "best_step": trained.best_step,
            "stopped_early": trained.stopped_early,
            "sequences_a_step": sequences,
            "processes": processes,
            "bf16": arguments.bf16,
            "trained_parameters": sum(t.numel() for t in trained.parameters.values()),
            "seconds": round(seconds, 2),
            "data": describe_mix(mix, self.data, mix.order(trained.steps * sequences)),
            "dropped": mix.dropped,
            "held_out_sequences": len(mix.held_out),
            "held_out": trained.held_out,
            "curve": trained.curve,
        }

    def _divergence(self, run: TrainingRun, diverged: Diverged) -> str:
        """Return the message for a training that diverged, once its last good parameters are kept."""
        if not diverged.finished_steps:
            causes = "the model, the teacher and the data" if self.loss == "kl" else "the model and the data"
            return f"the loss is NaN or infinite before anything is trained; check {causes}"
        problem = f"the loss turned NaN or infinite in step {diverged.step}"
        if not diverged.good_step:
            return (
                f"{problem}, before anything was gained; lower learning_rate ({self.learning_rate:g}), or raise warmup"
            )
        return f"{problem}; {self.keep_last_good(run, diverged)}"
