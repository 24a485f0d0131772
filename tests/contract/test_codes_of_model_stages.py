"""A stage may leave a model whose linears hold codes: these codes are what is written."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

import laconic
from artifacts import gptq, logits, original, quantized_linears, recipe, rtn, tensors
from extra_methods import allow_methods
from laconic.runtime.linear import QLinear
from laconic.runtime.reading import load
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


TUNED = "model.layers.1.self_attn.o_proj"


class ScaleTuning(ModelStage):
    """Doubles the scales of one linear, as a stage would that tunes them, and leaves the codes."""

    example: ClassVar = {}
    method: Literal["scale_tuning"] = "scale_tuning"

    @property
    def accepts_codes(self) -> bool:
        return True

    def apply(self, task: ModelTask) -> ModelOutcome:
        model = load(task.folder)
        linear = model.get_submodule(TUNED)
        assert isinstance(linear, QLinear)
        linear.weight_scale.data = (linear.weight_scale.float() * 2).to(linear.weight_scale.dtype)
        return ModelOutcome(model)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "stage", [gptq("W4A16_ASYM", group_size=32, low_rank=2), rtn("W8A8"), rtn("NVFP4A16")], ids=lambda s: s["scheme"]
)
def test_codes_are_written_and_not_rounded_again(
    arch: str, stage: dict[str, object], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_methods(monkeypatch, ScaleTuning)
    model = make_model(tmp_path / "model", arch)
    tuning = {"method": "scale_tuning"}
    before = laconic.compress(str(model), recipe(stage, text=text), tmp_path / "before")
    after = laconic.compress(str(model), recipe(stage, tuning, text=text), tmp_path / "after")
    old, new = tensors(before.path), tensors(after.path)
    assert old.keys() == new.keys()
    changed = {n for n in old if not torch.equal(old[n].view(torch.uint8), new[n].view(torch.uint8))}
    assert changed == {f"{TUNED}.weight_scale"}
    assert after.config["quantization_config"] == before.config["quantization_config"]
    opened = laconic.load(after.path)
    assert quantized_linears(opened).keys() == quantized_linears(laconic.load(before.path)).keys()
    if arch == "llama":
        assert torch.equal(logits(original(after.path)), logits(opened)) or stage["scheme"] in ("W8A8", "NVFP4A16")
