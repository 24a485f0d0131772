"""Recovery: low-rank adapters trained on a mix of text and instructions, then merged into the weights or kept beside.

What the base is held in while adapters are trained is all in which such stages differ (`hold`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.files import open_checkpoint
from laconic.checkpoint.layout import TransposedLinear, arrange
from laconic.checkpoint.source import (
    Source,
    build_skeleton,
    check_tokens,
    load_tokenizer,
    main_dtype,
    materialise,
    model_folder,
    read_config,
)
from laconic.data.mix import Mix, TextSource, describe_mix, read_mix
from laconic.runtime.adapter_files import ADAPTER, check_adapter, check_peft, read_adapter, write_adapter
from laconic.runtime.adapters import adapt, merge
from laconic.runtime.reading import load
from laconic.stages.model import ModelStage, Remade, Work
from laconic.stages.targets import Patterns, find_targets
from laconic.structure.anatomy import Anatomy, dissect, linears_of
from laconic.structure.experts import Experts
from laconic.train.block_tuning import passing_gradients
from laconic.train.finetune import Course, Diverged, Trained, cut_by_block, finetune, recomputed
from laconic.train.losses import Loss, distillation_loss, language_loss
from laconic.train.ranks import is_main, world


class Recovery(ModelStage):
    """data: what to train on. rank, alpha, dropout: of the adapters. loss: `lm`, of the text, or `kl`, to what
    another model says of it: `teacher`, a folder or Hub name, or else the recipe's original. eval_every, save_every: in
    steps. keep_adapters: leave them beside the weights; beside codes they always are. start: a folder with
    adapters to begin from."""

    data: tuple[TextSource, ...] = Field(min_length=1)
    targets: Patterns = Field(("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
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
    keep_adapters: bool = False
    start: str | None = None

    @model_validator(mode="after")
    def _measured(self) -> Recovery:
        if self.patience is not None and not self.held_out:
            raise ValueError("patience counts measurements of the held-out loss; set held_out, or leave patience out")
        return self

    @property
    def takes_codes(self) -> bool:
        return True

    def leaves_adapters(self, *, quantized: bool) -> bool:
        return self.keep_adapters or quantized

    @property
    def packed(self) -> bool:
        """Whether codes of a quantized base are decoded in every pass rather than once."""
        return False

    def hold(self, linear: nn.Linear) -> nn.Module:
        """How a frozen linear is held while its adapter is trained."""
        return linear

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        kept = self.keep_adapters or quantized
        names = self._names(model, dissect(model), kept=kept)
        if kept:
            check_peft()
        for name in names:
            linear = model.get_submodule(name)
            if isinstance(linear, nn.Linear) and self.rank > min(linear.weight.shape):
                raise ValueError(
                    f"rank {self.rank} is more than {min(linear.weight.shape)}, the rank of {name} itself; lower it"
                )
        if self.start:
            self._check_start(None if reshaped else model, names)
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
        mix = self._mix(source.folder, source.config.get_text_config().vocab_size, 0)
        self._steps(mix)
        return {"data": mix.sha256}

    def remake(self, work: Work) -> Remade:
        begun = time.monotonic()
        raw, config = read_config(work.folder, trust_remote_code=work.trust_remote_code)
        quantized = "quantization_config" in raw
        shape = build_skeleton(_plain(config), torch.bfloat16, trust_remote_code=work.trust_remote_code)
        anatomy = dissect(shape)
        names = self._names(shape, anatomy, kept=self.keep_adapters or quantized)
        if self.start:
            self._check_start(shape, names)
        mix = self._mix(work.folder, config.get_text_config().vocab_size, work.seed, work.trust_remote_code)
        course = self._course(mix, work)
        mixture = any(isinstance(m, Experts) for m in shape.modules())
        accelerator = Accelerator(
            cpu=work.device.type == "cpu",
            # No token may have been routed to an expert.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=mixture)],
        )
        if accelerator.distributed_type == DistributedType.FSDP:
            cut_by_block(accelerator.state.fsdp_plugin, next(shape.get_submodule(anatomy.blocks).children()))
        with ExitStack() as during:
            model = self._open_quantized(work, names, course, accelerator, during) if quantized else None
            model = model or self._open(work, anatomy.blocks, names, course, accelerator)
            if self.start:
                model.load_state_dict(read_adapter(Path(self.start).expanduser())[0], strict=False)
            if self.gradient_checkpointing:
                during.enter_context(recomputed(list(model.get_submodule(anatomy.blocks).children())))
            during.enter_context(torch.enable_grad())
            try:
                loss = self._loss(work, course, accelerator)
                trained = finetune(model, loss, mix, course, accelerator, work.scratch, work.report)
            except Diverged as e:
                raise ValueError(self._rescue(e, work, shape)) from e
            del model, loss
        told = self._told(trained, mix, course, accelerator, time.monotonic() - begun)
        results = {f"training-{self.method}": told}
        if not is_main():
            return Remade(None)
        if quantized or self.keep_adapters:
            self._write(work.artifact / ADAPTER, trained.parameters, shape, str(work.folder))
            return Remade(None, results=results)
        dtype = main_dtype(open_checkpoint(work.folder))
        model = build_skeleton(config, dtype, trust_remote_code=work.trust_remote_code)
        materialise(model, "", arrange(open_checkpoint(work.folder), model), torch.device("cpu"))
        merge(model, trained.parameters, self.alpha / self.rank)
        return Remade(model, results=results)

    def _open(
        self, work: Work, blocks: str, names: list[str], course: Course, accelerator: Accelerator
    ) -> PreTrainedModel:
        """The dense model with its adapters, loaded block by block, so that of what is held in 4 bits only one block is
        on the device in 16."""
        _, config = read_config(work.folder, trust_remote_code=work.trust_remote_code)
        model = build_skeleton(config, _dtype(course), trust_remote_code=work.trust_remote_code)
        checkpoint = arrange(open_checkpoint(work.folder), model)
        generator, masked = torch.Generator().manual_seed(work.seed), not self.keep_adapters
        for i, block in enumerate(model.get_submodule(blocks).children()):
            materialise(block, f"{blocks}.{i}.", checkpoint, _place(accelerator))
            inside = [n for n in names if n.startswith(f"{blocks}.{i}.")]
            self._adapt(model, inside, generator, masked=masked)
        materialise(model, "", checkpoint, _place(accelerator))
        self._adapt(model, [n for n in names if not n.startswith(f"{blocks}.")], generator, masked=masked)
        return model

    def _open_quantized(
        self, work: Work, names: list[str], course: Course, accelerator: Accelerator, during: ExitStack
    ) -> PreTrainedModel:
        """The model that codes stand for, with adapters beside them; `during` lets gradients through it."""
        dtype, trusted = _dtype(course), work.trust_remote_code
        model = load(
            work.folder, device=_place(accelerator), dtype=dtype, packed=self.packed, trust_remote_code=trusted
        )
        self._adapt(model, names, torch.Generator().manual_seed(work.seed), masked=False)
        during.enter_context(passing_gradients(model, dtype))
        return model

    def _loss(self, work: Work, course: Course, accelerator: Accelerator) -> Loss:
        if self.loss == "lm":
            return language_loss
        trusted = work.trust_remote_code
        teacher = load(
            self.teacher or work.original, device=_device(accelerator), dtype=_dtype(course), trust_remote_code=trusted
        )
        return distillation_loss(teacher)

    def _adapt(self, model: nn.Module, names: list[str], generator: torch.Generator, *, masked: bool) -> None:
        made = adapt(
            model,
            names,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            masked=masked,
            generator=generator,
            hold=self.hold,
        )
        for adapter in made.values():
            # The model's own dropout stays off: what is to come back is what it computes when it is used.
            adapter.training = True

    def _names(self, model: PreTrainedModel, anatomy: Anatomy, *, kept: bool) -> list[str]:
        """Full names of the targeted linears, in the model's order."""
        shapes = {n: (m.out_features, m.in_features) for n, m in linears_of(model).items()}
        inside = [n for n in shapes if n.startswith(f"{anatomy.blocks}.") and n not in anatomy.routers]
        found = set(find_targets(self.targets, self.ignore, shapes, inside, anatomy.head))
        if anatomy.head in found and anatomy.tied:
            raise ValueError(
                f"targets name {anatomy.head}, which shares its weight with the embeddings; put it in ignore"
            )
        experts = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Experts))
        if kept and any(n.startswith(experts) for n in found):
            raise ValueError(
                "adapters of experts can be merged but not kept, since engines stack experts; narrow targets to "
                "attention"
            )
        return [n for n in shapes if n in found]

    def _check_teacher(self, source: Source) -> None:
        if self.loss != "kl":
            raise ValueError("teacher goes with loss: kl; set that, or leave it out")
        _, config = read_config(model_folder(str(self.teacher)))
        ours, theirs = (c.get_text_config().vocab_size for c in (source.config, config))
        if ours != theirs:
            raise ValueError(
                f"teacher {self.teacher} knows {theirs} tokens, the model {ours}; name one of the same tokenizer"
            )

    def _check_start(self, model: nn.Module | None, names: list[str]) -> None:
        """model: whose linears of these names are to be trained, if it is known by now."""
        linears = {n: linears_of(model)[n] for n in names} if model else None
        check_adapter(Path(str(self.start)).expanduser(), linears, self.rank, self.alpha)

    def _mix(self, folder: Path, known: int, seed: int, trust_remote_code: bool = False) -> Mix:
        """known: how many tokens the model has."""
        mix = read_mix(
            self.data,
            load_tokenizer(folder, trust_remote_code=trust_remote_code),
            length=self.max_seq_length,
            held_out=self.held_out,
            held_out_samples=self.held_out_samples,
            seed=seed,
        )
        check_tokens(mix.highest, known, folder)
        return mix

    def _steps(self, mix: Mix) -> int:
        batch = self.batch_size * self.gradient_accumulation * world()
        there = sum(len(p) for p in mix.parts)
        if there < batch:
            raise ValueError(
                f"data gives {there} sequences to train on, less than one batch of {batch} (batch_size x "
                "gradient_accumulation x processes); give more, or lower batch_size or max_seq_length"
            )
        return self.max_steps or max(1, self.epochs * mix.epoch // batch)

    def _course(self, mix: Mix, work: Work) -> Course:
        bf16 = self.precision == "bf16" or (
            self.precision == "auto" and work.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return Course(
            self._steps(mix),
            self.batch_size,
            self.gradient_accumulation,
            self.learning_rate,
            self.warmup,
            self.schedule,
            self.weight_decay,
            self.max_grad_norm,
            self.eval_every,
            self.patience,
            self.save_every,
            bf16,
            work.seed,
        )

    def _told(
        self, trained: Trained, mix: Mix, course: Course, accelerator: Accelerator, seconds: float
    ) -> dict[str, Any]:
        """For `results/`: how the training went."""
        sequences = course.batch_size * course.gradient_accumulation * accelerator.num_processes
        return {
            "loss": self.loss,
            "steps": trained.steps,
            "best_step": trained.best_step,
            "stopped_early": trained.stopped_early,
            "sequences_a_step": sequences,
            "processes": accelerator.num_processes,
            "bf16": course.bf16,
            "trained_parameters": sum(t.numel() for t in trained.parameters.values()),
            "seconds": round(seconds, 2),
            "data": describe_mix(mix, self.data, mix.order(trained.steps * sequences)),
            "dropped": mix.dropped,
            "held_out_sequences": len(mix.held_out),
            "held_out": trained.held_out,
            "curve": trained.curve,
        }

    def _write(self, folder: Path, state: Mapping[str, Tensor], model: nn.Module, base: str) -> None:
        linears = linears_of(model)
        write_adapter(
            folder,
            state,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            linears=list(linears),
            transposed=any(isinstance(linears[n.rpartition(".")[0]], TransposedLinear) for n in state),
            base=base,
        )

    def _rescue(self, diverged: Diverged, work: Work, model: nn.Module) -> str:
        """Keep the last good adapters where the next run does not clear them away; what to say of it."""
        if not diverged.moved:
            whose = "the model, the teacher and the data" if self.loss == "kl" else "the model and the data"
            return f"the loss is NaN or infinite before anything is trained; check {whose}"
        said = f"the loss turned NaN or infinite in step {diverged.step}"
        if not diverged.good:
            return f"{said}, before anything was gained; lower learning_rate ({self.learning_rate:g}), or raise warmup"
        kept = work.artifact.with_name(work.artifact.name.removesuffix(".partial") + ".last-good")
        try:
            check_peft()
            if is_main():
                self._write(kept, diverged.parameters, model, str(work.folder))
        except (ValueError, OSError) as e:
            return (
                f"{said}; the adapters of step {diverged.good} could not be kept in {kept} ({e}): lower learning_rate "
                f"({self.learning_rate:g}), and pass --overwrite"
            )
        return (
            f"{said}; the adapters of step {diverged.good} are kept in {kept}: lower learning_rate "
            f"({self.learning_rate:g}), set start: {kept} to go on from them, and pass --overwrite"
        )


def _dtype(course: Course) -> torch.dtype:
    """In which frozen weights are held, where not as codes."""
    return torch.bfloat16 if course.bf16 else torch.float32


def _device(accelerator: Accelerator) -> torch.device:
    """Of this process; there is but one CPU, though accelerate counts."""
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device


def _place(accelerator: Accelerator) -> torch.device:
    """Where the model is loaded. Under FSDP a process gets its part of it only once the whole of it is there.

    Raises: ValueError for FSDP's first version.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return _device(accelerator)
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP's first version cannot train adapters beside frozen weights; use --fsdp_version 2")
    return torch.device("cpu")


def _plain(config: Any) -> Any:
    """The same without what it says of codes."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
