"""LLM.int8 against the paper's own loop, and against naive rounding where there are outliers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import laconic
from artifacts import logits, original, press, quantized_linears, rtn
from commands import Laconic
from laconic.formats.storage import scheme_of_shapes
from laconic.methods.llm_int8 import LlmInt8
from laconic.runtime.linear import QLinear
from linears import compressed, moments_of
from tiny import make_recipe

LLM_INT8 = {"method": "llm_int8", "threshold": 2.5}


def stage(**keys: Any) -> LlmInt8:
    return LlmInt8.model_validate(keys)


def outlying(tokens: int = 40, n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, n, generator=generator).clamp(-5, 5)
    x[:, [4, 30]] *= 20
    x[7, 11] = -6.0
    return x, torch.randn(20, n, generator=generator)


def papers(x: Tensor, W: Tensor, outliers: list[int]) -> Tensor:
    """Section 3, element by element in float64: C = X_O W_O + S (X W) over the quiet columns."""
    quiet = [h for h in range(x.shape[1]) if h not in outliers]
    out = torch.zeros(len(x), len(W), dtype=torch.float64)
    for i, token in enumerate(x.double()):
        c_x = token[quiet].abs().max()
        a = (127 * token[quiet] / c_x).round()
        for j, row in enumerate(W.double()):
            c_w = row[quiet].abs().max()
            b = (127 * row[quiet] / c_w).round()
            out[i, j] = c_x * c_w / 127**2 * (a @ b) + token[outliers] @ row[outliers]
    return out


@pytest.mark.parametrize(
    ("keys", "outliers"), [({}, [4, 11, 30]), ({"threshold": 6.1}, [4, 30]), ({"outlier_ratio": 0.02}, [4])], ids=str
)
def test_it_computes_what_the_paper_says(keys: dict[str, Any], outliers: list[int]) -> None:
    x, W = outlying()
    (outcome,) = compressed(stage(**keys), W, moments_of(x, gram=False), torch.float32)
    if len(outliers) > 1:
        assert outcome.notes["outlier_columns"] == len(outliers)
        assert outcome.weight.outliers.indices.tolist() == outliers
    else:
        outliers = outcome.weight.outliers.indices.tolist()
        assert outliers in ([4], [30])
    stored = outcome.weight.to_tensors()
    kept = scheme_of_shapes(stage().proposed_scheme, {n: tuple(t.shape) for n, t in stored.items()})
    linear = QLinear(x.shape[1], len(W), bias=False, scheme=kept, dtype=torch.float32)
    for name, tensor in stored.items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    expected = papers(x, W, outliers)
    # A half that falls to the other side in float32 moves one output by one step.
    assert float((linear(x).double() - expected).norm() / expected.norm()) < 1e-4


@pytest.fixture(scope="module")
def pressed(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return press(llama, tmp_path_factory.mktemp("artifacts") / "int8", LLM_INT8, text=text).path


def test_an_artifact_says_how_many_columns_each_linear_keeps(pressed: Path) -> None:
    config = json.loads((pressed / "config.json").read_text())["quantization_config"]
    linears = quantized_linears(laconic.load(pressed))
    counts = {n: m.scheme.outlier_columns for n, m in linears.items() if m.scheme.outlier_columns}
    assert config["quant_method"] == "laconic"
    assert config["outlier_columns"] == counts
    # The number differs from tap to tap, and not within one.
    assert len(set(counts.values())) > 1
    for i in range(2):
        q, k, v = (linears[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv")
        assert torch.equal(q.outlier_indices, k.outlier_indices)
        assert torch.equal(q.outlier_indices, v.outlier_indices)


def test_the_command_line_tells_what_could_not_be_foretold(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path
) -> None:
    calibration = {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 32}
    stage = LLM_INT8 | {"threshold": 0.5, "ignore": "re:.*layers.1.*"}
    recipe = make_recipe(tmp_path / "recipe.yaml", stage, model=str(llama), calibration=calibration)
    ran = laconic("compress", recipe, "-o", tmp_path / "out")
    assert (
        "warning: the number of columns in 16 bit is known after calibration; the predicted size counts none" in ran.err
    )
    assert "7 linears keep up to " in ran.err
    assert "for a smaller file raise the threshold there, or give outlier_ratio" in ran.err


def test_transformers_computes_it_as_we_do(pressed: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(pressed).eval()
    assert torch.equal(logits(theirs), logits(laconic.load(pressed)))


def test_where_nothing_reaches_the_threshold_it_is_plain_w8a8(llama: Path, text: Path, tmp_path: Path) -> None:
    path = press(llama, tmp_path / "quiet", LLM_INT8 | {"threshold": 1e6}, text=text).path
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config.keys().isdisjoint({"outlier_columns", "low_rank"})
    assert logits(AutoModelForCausalLM.from_pretrained(path)).isfinite().all()


def test_planted_outliers_hurt_naive_rounding_and_not_this(llama: Path, text: Path, tmp_path: Path) -> None:
    from plant_outliers import plant

    model = original(llama)
    before = logits(model)
    assert plant(model, torch.tensor([3, 20, 50]), 64) == 4
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "planted")
    for file in llama.glob("token*"):
        (tmp_path / "planted" / file.name).write_bytes(file.read_bytes())
    naive, ours = (
        float((logits(laconic.load(press(tmp_path / "planted", tmp_path / name, s, text=text).path)) - before).norm())
        for name, s in (("naive", rtn("W8A8")), ("ours", {"method": "llm_int8", "threshold": 12.0}))
    )
    assert ours < naive / 3
