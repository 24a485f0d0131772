"""A method that returns something else than its contract says is named, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import laconic
from artifacts import recipe
from extra_methods import allow_methods
from laconic.formats import Quantized, Transforms, quantize
from laconic.formats.schemes import scheme
from laconic.stages.block import Block, BlockStage
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from laconic.stages.quantizing import QuantizingStage

EIGHT = scheme("W8A16", group_size=32).weights


class Toy(QuantizingStage, LinearStage):
    """Returns what a test says."""

    returned: ClassVar[Callable[[LinearTask], Any]]
    method: Literal["toy"] = "toy"

    def compress(self, task: LinearTask) -> Outcome:
        returned: Outcome = type(self).returned(task)
        return returned


class DenseToy(LinearStage):
    """Returns codes, though it quantizes nothing."""

    method: Literal["toy"] = "toy"

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(quantize(EIGHT, task.weight, EIGHT.fit(task.weight, task.dtype)))


class BlockToy(QuantizingStage, BlockStage):
    """Returns what a test says."""

    returned: ClassVar[Callable[[Block], Any]]
    method: Literal["toy"] = "toy"

    def compress(self, block: Block) -> Mapping[tuple[str, ...], Outcome]:
        returned: Mapping[tuple[str, ...], Outcome] = type(self).returned(block)
        return returned


def _codes(task: LinearTask, dtype: torch.dtype | None = None) -> Quantized:
    return quantize(task.format, task.weight, task.format.fit(task.weight, dtype or task.dtype))


def _turned(task: LinearTask) -> Outcome:
    signs = torch.ones(task.weight.shape[1], dtype=task.dtype)
    return Outcome(replace(_codes(task), transforms=Transforms(signs)))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (_codes, r"Toy.compress\(\) returned Quantized; return laconic.stages.linear.Outcome\(weight\)"),
        (lambda t: Outcome(t.weight), r"returned a Tensor for linears of scheme W4A16; return a Quantized"),
        (lambda t: Outcome(quantize(EIGHT, t.weight, EIGHT.fit(t.weight, t.dtype))), "take the format from the task"),
        (lambda t: Outcome(_codes(t).rows(0, 8)), r"returned a weight \(8, 64\) for \(128, 64\); return all rows"),
        (lambda t: Outcome(_codes(t, torch.float32)), r"float32 as weight_scale, and the scheme has .* bfloat16"),
        (_turned, r"bfloat16 as input_transform, and the scheme has nothing"),
        (
            lambda t: Outcome(_codes(t), {"loss": t.weight}),
            "a Tensor as the note 'loss'; notes are numbers for the log",
        ),
        (lambda t: Outcome(_codes(t), {"kind": "x"}), "a str as the note 'kind'"),  # type: ignore[dict-item]
        (lambda t: t.hessian, "no Hessian was observed; declare second_moments in the method's needs"),
    ],
    ids=["no outcome", "dense", "format", "rows", "dtype", "transform", "tensor note", "text note", "hessian"],
)
def test_what_a_linear_stage_returns_wrongly_is_told(
    returned: Any, message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "returned", staticmethod(returned), raising=False)
    allow_methods(monkeypatch, Toy)
    with pytest.raises(TypeError, match=message):
        laconic.compress(str(llama), recipe({"method": "toy", "scheme": "W4A16", "group_size": 32}), tmp_path / "out")


def test_codes_without_a_scheme_are_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_methods(monkeypatch, DenseToy)
    with pytest.raises(TypeError, match="returned a Quantized for linears without a scheme; return a dense weight"):
        laconic.compress(str(llama), recipe({"method": "toy"}), tmp_path / "out")


def test_weights_that_are_not_finite_are_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseToy, "compress", lambda _, task: Outcome(task.weight * float("nan")))
    allow_methods(monkeypatch, DenseToy)
    with pytest.raises(ValueError, match=r"toy leaves NaN or infinity in model.layers.0.self_attn.q_proj; check the"):
        laconic.compress(str(llama), recipe({"method": "toy"}), tmp_path / "out")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda _: None, r"BlockToy.compress\(\) must return a mapping from tuples of linears to outcomes"),
        (lambda _: {}, r"returned no codes for mlp.down_proj; return an outcome for each of block.schemes"),
        (lambda b: {(f"{b.name}.mlp.up_proj",): 0}, r"which is none of its linears within the block \(mlp.down_proj, "),
        (lambda b: dict.fromkeys(((n,) for n in b.schemes), 0), r"returned int; return laconic.stages.linear.Outc"),
    ],
    ids=["none", "empty", "full names", "no outcomes"],
)
def test_what_a_block_stage_returns_wrongly_is_told(
    returned: Any, message: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockToy, "returned", staticmethod(returned), raising=False)
    allow_methods(monkeypatch, BlockToy)
    stage = {"method": "toy", "scheme": "W4A16", "group_size": 32}
    with pytest.raises(TypeError, match=message):
        laconic.compress(str(llama), recipe(stage, text=text), tmp_path / "out")


class ModelToy(ModelStage):
    """Returns what a test says."""

    returned: ClassVar[Callable[[ModelTask], Any]]
    method: Literal["toy"] = "toy"

    def apply(self, task: ModelTask) -> ModelOutcome:
        returned: ModelOutcome = type(self).returned(task)
        return returned


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda _: None, r"ModelToy.apply\(\) returned NoneType; return laconic.stages.model.ModelOutcome\(model\)"),
        (lambda t: t.windows, "no calibration text was read; declare activations in the method's needs"),
    ],
    ids=["nothing", "windows"],
)
def test_what_a_model_stage_does_wrongly_is_told(
    returned: Any, message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelToy, "returned", staticmethod(returned), raising=False)
    allow_methods(monkeypatch, ModelToy)
    with pytest.raises(TypeError, match=message):
        laconic.compress(str(llama), recipe({"method": "toy"}), tmp_path / "out")


def _with_norm(task: ModelTask, norm: torch.Tensor, **config: Any) -> ModelOutcome:
    model: Any = laconic.load(task.folder)
    model.model.norm.weight = torch.nn.Parameter(norm)
    return ModelOutcome(model, config)


def test_a_model_that_could_not_be_opened_is_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_methods(monkeypatch, ModelToy)
    shape = r"ModelToy.apply\(\) returned \(32,\) as model.norm.weight, which is \(64,\) by config.json; put the keys"
    nan = r"stages.0 \(toy\): model.norm.weight holds NaN or infinity afterwards; check the model and the texts"
    for returned, error, message in (
        (lambda t: _with_norm(t, torch.ones(32)), TypeError, shape),
        (lambda t: _with_norm(t, torch.ones(32), rms_norm_eps=1e-5), TypeError, shape),
        (lambda t: _with_norm(t, torch.full((64,), float("nan"))), ValueError, nan),
        (
            lambda _: ModelOutcome(None, shards=[lambda: {"model.norm.weight": torch.tensor([torch.inf])}]),
            ValueError,
            nan,
        ),
    ):
        monkeypatch.setattr(ModelToy, "returned", staticmethod(returned), raising=False)
        with pytest.raises(error, match=message):
            laconic.compress(str(llama), recipe({"method": "toy"}), tmp_path / "out")
