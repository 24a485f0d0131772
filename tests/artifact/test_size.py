"""Bits and bytes, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from artifacts import gptq, press, recipe, rtn, tensors
from laconic.artifact.size import measure_size
from laconic.pipeline.compression import prepare
from tiny import VOCABULARY, make_model

# The tiny Llama: two blocks, hidden 64, intermediate 128, 4 heads of 16 of which 2 hold keys and values.
Q, K, V, O, GATE, UP, DOWN = 64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 64 * 128
LINEARS = 2 * (Q + K + V + O + GATE + UP + DOWN)
ROWS = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
NORMS = 2 * 2 * 64 + 64
EMBEDDINGS = VOCABULARY * 64
SHAPES = 2 * 7 * 2 * 8


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


def outside(tied: bool) -> int:
    return EMBEDDINGS * (1 if tied else 2) + NORMS


def test_a_plain_model_has_sixteen_bits(tied: bool, tmp_path: Path) -> None:
    size = measure_size(make_model(tmp_path, tied=tied))
    assert size.parameters == LINEARS + outside(tied)
    assert size.tensor_bytes == 2 * size.parameters
    assert size.bits_per_weight == 16
    assert (size.schemes, size.covered, size.simulated) == ({}, 0, False)


@pytest.mark.parametrize(
    ("stage", "linear_bytes"),
    [
        (rtn("W4A16", group_size=32), LINEARS // 2 + LINEARS // 32 * 2 + SHAPES),
        (rtn("W4A16_ASYM", group_size=32), LINEARS // 2 + LINEARS // 32 * 2 + LINEARS // 32 // 2 + SHAPES),
        (rtn("W3A16", group_size=-1), LINEARS * 3 // 8 + ROWS * 2 + SHAPES),
        (rtn("W8A8"), LINEARS + ROWS * 2),
        (rtn("W6A6"), LINEARS * 6 // 8 + ROWS * 2 + SHAPES),
        (rtn("FP8"), LINEARS + 14 * 2 + 14 * 2),
        (rtn("NVFP4"), LINEARS // 2 + LINEARS // 16 + 14 * 4 + 14 * 4),
        (rtn("MXFP4A16"), LINEARS // 2 + LINEARS // 32),
    ],
    ids=lambda v: v["scheme"] if isinstance(v, dict) else "",
)
def test_every_stored_bit_counts(stage: dict, linear_bytes: int, tied: bool, text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tied=tied)
    artifact = press(model, tmp_path / "artifact", stage, text=text).path
    size = measure_size(artifact)
    assert size.parameters == LINEARS + outside(tied)
    assert size.tensor_bytes == linear_bytes + 2 * outside(tied) == sum(t.nbytes for t in tensors(artifact).values())
    assert size.bits_per_weight == pytest.approx(8 * size.tensor_bytes / size.parameters)
    assert size.covered == pytest.approx(LINEARS / size.parameters)
    assert size.schemes == {stage["scheme"]: 14}
    assert size.simulated == (stage["scheme"] == "W6A6")
    assert size.file_bytes == sum(f.stat().st_size for f in artifact.glob("*.safetensors"))


@pytest.mark.parametrize("stage", [gptq("W4A16_ASYM", group_size=32), rtn("FP8"), rtn("W8A8")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_forecast_comes_true(stage: dict, dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=dtype)
    forecast = prepare(str(model), recipe(stage, text=text), tmp_path / "artifact").forecast
    press(model, tmp_path / "artifact", stage, text=text)
    before, after = measure_size(model), measure_size(tmp_path / "artifact")
    assert forecast.bytes_before == before.tensor_bytes
    assert forecast.bytes_after == pytest.approx(after.tensor_bytes, rel=2e-3)
    assert forecast.covered == pytest.approx(after.covered)


def test_two_schemes_are_counted_each(llama: Path, tmp_path: Path) -> None:
    stages = rtn("W8A16", targets="re:.*self_attn.*"), rtn("W4A16", group_size=32, targets="re:.*mlp.*")
    size = measure_size(press(llama, tmp_path / "artifact", *stages).path)
    assert size.schemes == {"W8A16": 8, "W4A16": 6}
