"""The loop over a whole model against a plain one, and with weights that are cut among processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cut import examples, train
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.data.mix import Mix
from laconic.train.finetune import TrainingArguments, finetune


class Bigram(nn.Module):
    """Logits of the next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))


def loss(model: Any, ids: Tensor, loss_mask: Tensor) -> Tensor:
    logits = getattr(model, "module", model).table[ids[:, :-1]]
    return F.cross_entropy(logits[loss_mask[:, 1:]], ids[:, 1:][loss_mask[:, 1:]], reduction="sum")


def test_it_is_adamw_on_the_mean_over_a_steps_tokens(tmp_path: Path) -> None:
    mix = Mix((examples(24, 0),), (1.0,), (), 0)
    arguments = TrainingArguments(
        steps=5,
        batch_size=2,
        gradient_accumulation=3,
        learning_rate=0.05,
        warmup=0.4,
        schedule="linear",
        weight_decay=0.1,
        max_grad_norm=0.5,
        eval_every=1,
        patience=None,
        save_every=1,
        bf16=False,
        seed=0,
    )
    model, plain = Bigram(), Bigram()
    with torch.enable_grad():
        made = finetune(model, loss, mix, arguments, accelerator=Accelerator(cpu=True), scratch=tmp_path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0, weight_decay=0.1)
    order = mix.order(30)
    for step in range(5):
        batch = [mix.at(o) for o in order[6 * step : 6 * step + 6]]
        ids, loss_mask = (torch.stack([getattr(e, k) for e in batch]) for k in ("ids", "loss_mask"))
        optimizer.zero_grad()
        mean = loss(plain, ids, loss_mask) / loss_mask.sum()
        mean.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        # Two of five steps rise, three fall.
        optimizer.param_groups[0]["lr"] = 0.05 * (0.5, 1.0, 1.0, 2 / 3, 1 / 3)[step]
        optimizer.step()
        assert made.curve[step]["loss"] == pytest.approx(float(mean.detach()), rel=1e-5)
    assert torch.allclose(made.parameters["table"], plain.table.detach(), atol=1e-5)


@pytest.mark.slow
def test_cut_among_processes_and_killed_it_comes_to_the_same(llama: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29521"]
    script = str(Path(__file__).with_name("cut.py"))
    for stop in (3, 0):
        ran = subprocess.run(
            [*launch, script, str(llama), str(tmp_path / "cut.pt"), str(stop)], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert (tmp_path / "cut.pt").exists() == (stop == 0)
    train(str(llama), tmp_path / "one.pt", Accelerator(cpu=True), 4)
    cut, one = (torch.load(tmp_path / f"{name}.pt") for name in ("cut", "one"))
    for key in ("curve", "held_out"):
        assert [m["loss"] for m in cut[key]] == pytest.approx([m["loss"] for m in one[key]], rel=1e-4)
    assert cut["parameters"].keys() == one["parameters"].keys()
    for name, p in one["parameters"].items():
        assert torch.allclose(cut["parameters"][name], p, atol=2e-3), name
