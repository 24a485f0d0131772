"""Stages that train low-rank adapters, then merge them into the weights or keep them beside.

The stages differ only in how the frozen weights are stored while adapters are trained (`frozen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.checkpoint.layout import TransposedLinear, arrange
from laconic.checkpoint.materialise import materialise
from laconic.checkpoint.source import Source, build_skeleton, main_dtype
from laconic.methods.lora.adapter_files import check_adapter, check_peft, write_adapter
from laconic.methods.lora.adapters import add_adapters, merge_adapters
from laconic.runtime.adapters import ADAPTER, read_adapter
from laconic.runtime.inputs import open_input
from laconic.runtime.reading import load
from laconic.stages.model import ModelOutcome
from laconic.stages.stage import TEXT
from laconic.stages.targets import Patterns, find_targets
from laconic.structure.anatomy import Anatomy, dissect, linears_of
from laconic.structure.experts import Experts
from laconic.train.block_tuning import differentiable_codes
from laconic.train.finetune import Diverged
from laconic.train.ranks import is_main
from laconic.train.stage import TrainingRun, TrainingStage
from laconic.train.state import State


class AdapterStage(TrainingStage):
    """Train adapters.

    Attributes:
        targets: linears that get an adapter; as in stages that treat weights.
        ignore: linears that get no adapter.
        rank: rank of the adapters.
        alpha: the adapters' product is scaled by alpha / rank.
        dropout: dropout of the adapters' input during training.
        keep_adapters: leave the adapters beside the weights in peft's format; beside codes they always are.
        start: a folder with adapters to begin from.
    """

    example: ClassVar = {
        "data": [{"dataset": TEXT}],
        "rank": 2,
        "max_steps": 2,
        "batch_size": 2,
        "max_seq_length": 32,
    }

    targets: Patterns = Field(("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    keep_adapters: bool = False
    start: str | None = None

    @property
    def accepts_codes(self) -> bool:
        return True

    def leaves_adapters(self, *, quantized: bool) -> bool:
        return self.keep_adapters or quantized

    @property
    def packed(self) -> bool:
        """Whether codes of a quantized base are decoded in every pass rather than once."""
        return False

    def frozen(self, linear: nn.Linear) -> nn.Module:
        """Return the module that takes the place of a frozen linear while its adapter is trained.

        Args:
            linear: the dense linear.
        """
        return linear

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        keeps = self.leaves_adapters(quantized=quantized)
        names = self._target_names(model, dissect(model), keeps=keeps)
        if keeps:
            check_peft()
        for name in names:
            linear = model.get_submodule(name)
            if isinstance(linear, nn.Linear) and self.rank > min(linear.weight.shape):
                raise ValueError(
                    f"rank {self.rank} is more than {min(linear.weight.shape)}, the rank of {name} itself; lower it"
                )
        if self.start:
            self._check_start(None if reshaped else model, names)
        return super().check(source, model, quantized=quantized, reshaped=reshaped)

    def prepare_run(self, run: TrainingRun) -> None:
        if self.start:
            self._check_start(run.skeleton, self._names(run))

    def open_model(self, run: TrainingRun) -> PreTrainedModel:
        model = self._open_quantized(run) if run.quantized else self._open_dense(run)
        if self.start:
            model.load_state_dict(read_adapter(Path(self.start).expanduser())[0], strict=False)
        return model

    def outcome(self, run: TrainingRun, parameters: State, results: Mapping[str, dict[str, Any]]) -> ModelOutcome:
        task = run.task
        if self.leaves_adapters(quantized=run.quantized):
            self._write(task.artifact / ADAPTER, parameters, run.skeleton, str(task.folder))
            return ModelOutcome(None, results=results)
        checkpoint = open_input(str(task.folder), trust=task.trust).checkpoint
        model = build_skeleton(run.config, main_dtype(checkpoint), trust=task.trust)
        materialise(model, "", arrange(checkpoint, model), torch.device("cpu"))
        merge_adapters(model, parameters, self.alpha / self.rank)
        return ModelOutcome(model, results=results)

    def keep_last_good(self, run: TrainingRun, diverged: Diverged) -> str:
        artifact, rate = run.task.artifact, f"{self.learning_rate:g}"
        folder = artifact.with_name(artifact.name.removesuffix(".partial") + ".last-good")
        try:
            check_peft()
            if is_main():
                self._write(folder, diverged.parameters, run.skeleton, str(run.task.folder))
        except (ValueError, OSError) as e:
            return (
                f"the adapters of step {diverged.good_step} could not be kept in {folder} ({e}): lower learning_rate "
                f"({rate}), and pass --overwrite"
            )
        return (
            f"the adapters of step {diverged.good_step} are kept in {folder}: lower learning_rate "
            f"({rate}), set start: {folder} to go on from them, and pass --overwrite"
        )

    def _open_dense(self, run: TrainingRun) -> PreTrainedModel:
        """Load the dense model with its adapters, block by block.

        Where frozen weights are stored in 4 bits, only one block is then on the device in 16 bit.
        """
        task, blocks, names = run.task, run.anatomy.blocks, self._names(run)
        model = build_skeleton(run.config, run.dtype, trust=task.trust)
        checkpoint = arrange(open_input(str(task.folder), trust=task.trust).checkpoint, model)
        generator, masked = torch.Generator().manual_seed(task.seed), not self.keep_adapters
        for i, block in enumerate(model.get_submodule(blocks).children()):
            materialise(block, f"{blocks}.{i}.", checkpoint, run.load_device)
            inside = [n for n in names if n.startswith(f"{blocks}.{i}.")]
            self._add_adapters(model, inside, generator, masked=masked)
        materialise(model, "", checkpoint, run.load_device)
        self._add_adapters(model, [n for n in names if not n.startswith(f"{blocks}.")], generator, masked=masked)
        return model

    def _open_quantized(self, run: TrainingRun) -> PreTrainedModel:
        """Load the model that holds codes, with adapters beside them, and let gradients through the codes."""
        model = load(
            run.task.folder,
            device=run.load_device,
            dtype=run.dtype,
            packed=self.packed,
            adapter=False,
            trust=run.task.trust,
        )
        self._add_adapters(model, self._names(run), torch.Generator().manual_seed(run.task.seed), masked=False)
        run.contexts.enter_context(differentiable_codes(model, run.dtype))
        return model

    def _add_adapters(
        self, model: nn.Module, names: Sequence[str], generator: torch.Generator, *, masked: bool
    ) -> None:
        adapters = add_adapters(
            model,
            names,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            masked=masked,
            generator=generator,
            replace_base=self.frozen,
        )
        for adapter in adapters.values():
            # The model's own dropout stays off: adapters are trained for the function that the model computes in use.
            adapter.training = True

    def _names(self, run: TrainingRun) -> list[str]:
        return self._target_names(run.skeleton, run.anatomy, keeps=self.leaves_adapters(quantized=run.quantized))

    def _target_names(self, model: PreTrainedModel, anatomy: Anatomy, *, keeps: bool) -> list[str]:
        """Return the full names of the targeted linears, in the model's order. keeps: whether adapters are kept."""
        shapes = {n: (m.out_features, m.in_features) for n, m in linears_of(model).items()}
        inside = [n for n in shapes if n.startswith(f"{anatomy.blocks}.") and n not in anatomy.routers]
        targets = set(find_targets(self.targets, self.ignore, shapes=shapes, inside=inside, head=anatomy.head))
        if anatomy.head in targets and anatomy.tied:
            raise ValueError(
                f"targets name {anatomy.head}, which shares its weight with the embeddings; put it in ignore"
            )
        experts = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Experts))
        if keeps and any(n.startswith(experts) for n in targets):
            raise ValueError(
                "adapters of experts can be merged but not kept, since engines stack experts; narrow targets to "
                "attention"
            )
        return [n for n in shapes if n in targets]

    def _check_start(self, model: nn.Module | None, names: Sequence[str]) -> None:
        """Check the adapters to begin from. model: whose linears of these names are trained, where it is known."""
        linears = {n: linears_of(model)[n] for n in names} if model else None
        check_adapter(Path(str(self.start)).expanduser(), linears, self.rank, self.alpha)

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
