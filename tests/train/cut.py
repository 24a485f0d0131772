"""Trains a model whose weights are cut among the processes of a launch, as FSDP 2 does it, on a CPU.

    torchrun cut.py MODEL OUTPUT STOP

accelerate cuts weights on GPUs alone; this has it do so on a CPU. STOP: end after so many steps, as if killed.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from laconic.data.mix import Example, Mix
from laconic.methods.lora.adapters import Nf4Linear, add_adapters
from laconic.runtime.reading import load
from laconic.train.finetune import TrainingArguments, finetune, wrap_each_block
from laconic.train.losses import language_loss


class Cutting(Accelerator):
    """Cuts the model as `accelerate launch --use_fsdp --fsdp_version 2` has it cut."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        order = [n for n, p in model.named_parameters() if p.requires_grad]
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
        wrap_each_block(plugin, model.model.layers[0])
        state = SimpleNamespace(fsdp_plugin=plugin)
        told = {"mixed_precision": "no", "device": self.device, "is_main_process": self.is_main_process}
        fsdp2_prepare_model(SimpleNamespace(state=state, **told), model)  # type: ignore[arg-type]
        assert all(isinstance(block, FSDPModule) for block in model.model.layers)
        parameters = dict(model.named_parameters())
        assert all(isinstance(parameters[n], DTensor) for n in order)
        optimizer.param_groups[0]["params"] = [parameters[n] for n in order]
        return model, super().prepare(optimizer)

    def unwrap_model(self, model: nn.Module, *_: Any) -> nn.Module:
        return model

    @contextmanager
    def no_sync(self, model: nn.Module) -> Any:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def examples(count: int, seed: int) -> tuple[Example, ...]:
    ids = torch.randint(3, 100, (count, 24), generator=torch.Generator().manual_seed(seed))
    loss_mask = torch.ones(24, dtype=torch.bool)
    loss_mask[0] = False
    return tuple(Example(row, loss_mask) for row in ids)


def train(model_folder: str, output: Path, accelerator: Accelerator, batch: int, stop: int = 0) -> None:
    """Six steps; the best adapters, and the loss of each step, go to `output`."""
    model = load(model_folder, dtype=torch.float32)
    for linear in (m for n, m in model.named_modules() if n.endswith("q_proj")):
        W = linear.weight.data
        W[W.abs() < W.abs().median()] = 0
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    generator = torch.Generator().manual_seed(0)
    down = [n for n in names if n.endswith("down_proj")]
    add_adapters(model, down, rank=2, alpha=4, dropout=0, masked=False, generator=generator, replace_base=Nf4Linear)
    rest = [n for n in names if n not in down]
    add_adapters(model, rest, rank=2, alpha=4, dropout=0, masked=True, generator=generator)
    mix = Mix((examples(48, 0),), (1.0,), examples(6, 1), 0)
    arguments = TrainingArguments(
        steps=6,
        batch_size=batch,
        gradient_accumulation=2,
        learning_rate=1e-2,
        warmup=0.0,
        schedule="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        eval_every=2,
        patience=None,
        save_every=2,
        bf16=False,
        seed=0,
    )

    def report(event: Any) -> None:
        if stop and event["step"] == stop:
            raise SystemExit(0)

    scratch = output.with_suffix(".scratch")
    scratch.mkdir(exist_ok=True)
    with torch.enable_grad():
        trained = finetune(
            model, language_loss, mix, arguments, accelerator=accelerator, scratch=scratch, report=report
        )
    if accelerator.is_main_process:
        torch.save({"parameters": trained.parameters, "curve": trained.curve, "held_out": trained.held_out}, output)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), Cutting(cpu=True), 2, int(sys.argv[3]))
    torch.distributed.destroy_process_group()
