"""Several schemes in one model, said by several stages: the example in docs/formats.md, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import laconic
from artifacts import Stage, gptq, linear_events, logits, original, press, quantized_linears, rtn, with_decoded_weights
from laconic import Artifact
from laconic.recipe import load_recipe
from tiny import make_model

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
EXAMPLE: dict[str, Any] = yaml.safe_load(re.search(r"<!-- example -->\n```yaml\n(.*?)```", DOCS.read_text(), re.S)[1])

ATTENTION, MLP = "self_attn.{}_proj".format, "mlp.{}_proj".format
BLOCK = [*map(ATTENTION, "qkvo"), *map(MLP, ("gate", "up", "down"))]
# What the page says of it, linear by linear.
MEANT = {
    f"model.layers.{i}.{name}": "W8A16" if "down" in name else None if i == 0 and "attn" in name else "NVFP4A16"
    for i in range(3)
    for name in BLOCK
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "three", num_hidden_layers=3)


@pytest.fixture(scope="module")
def mixed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(model, tmp_path_factory.mktemp("artifacts") / "mixed", *EXAMPLE["stages"], text=text)


def test_every_linear_has_the_scheme_that_the_recipe_means(mixed: Artifact) -> None:
    found = {name: linear.scheme.name for name, linear in quantized_linears(laconic.load(mixed.path)).items()}
    assert found == {name: scheme for name, scheme in MEANT.items() if scheme}
    assert {e["linear"]: e["scheme"] for e in linear_events(mixed)} == found


def test_the_config_names_the_exceptions_and_leaves_the_rest_to_the_class(mixed: Artifact) -> None:
    config = json.loads((mixed.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "mixed-precision"
    groups = {g["format"]: g["targets"] for g in config["config_groups"].values()}
    assert groups == {
        "pack-quantized": [n for n, s in MEANT.items() if s == "W8A16"],
        "nvfp4-pack-quantized": ["Linear"],
    }
    assert set(config["ignore"]) == {"lm_head", *(n for n, s in MEANT.items() if s is None)}


def test_transformers_and_laconic_read_what_was_chosen(mixed: Artifact, model: Path) -> None:
    ours = logits(laconic.load(mixed.path))
    assert torch.equal(ours, logits(with_decoded_weights(model, mixed.path)))
    assert torch.equal(ours, logits(original(mixed.path)))


def test_fp4_may_stand_beside_what_no_engine_runs(model: Path, text: Path, tmp_path: Path) -> None:
    stages = [rtn("NVFP4", targets="re:.*mlp.*"), rtn("W6A6", targets="re:.*self_attn.*")]
    artifact = press(model, tmp_path / "native", *stages, text=text)
    assert torch.equal(logits(original(artifact.path)), logits(laconic.load(artifact.path)))


DOWN = "re:.*down_proj"


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        (
            [gptq("NVFP4A16", ignore=DOWN), gptq("W8A16", targets="re:.*dwn_proj")],
            "stages.1.targets 're:.*dwn_proj' ma",
        ),
        (
            [gptq("NVFP4A16"), gptq("W8A16", targets=DOWN)],
            "stages.1 (gptq) would quantize model.layers.0.mlp.down_proj",
        ),
        ([rtn("MXFP4A16", ignore="re:.*up_proj"), rtn("W8A16", targets="re:.*up_proj")], "must share a scheme"),
        ([rtn("NVFP4A16", ignore="re:.*q_proj")], "must share a scheme"),
        ([rtn("W8A16", targets=DOWN, ignore=DOWN)], "stages.0 ignores every linear that it targets"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_mixture_that_cannot_be_is_refused(
    stages: list[Stage], complaint: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        press(model, tmp_path / "refused", *stages, text=text)


def test_groups_of_fp4_must_divide_the_inputs(text: Path, tmp_path: Path) -> None:
    odd = make_model(tmp_path / "odd", intermediate_size=120)
    with pytest.raises(ValueError, match=r"groups of 32, which do not divide the 120 inputs of .*down_proj"):
        press(odd, tmp_path / "refused", rtn("MXFP4A16"))
    stages = [rtn("MXFP4A16", ignore=DOWN), rtn("W8A16", targets=DOWN)]
    linears = quantized_linears(laconic.load(press(odd, tmp_path / "mixed", *stages).path))
    assert {linear.scheme.name for linear in linears.values()} == {"MXFP4A16", "W8A16"}


def test_the_example_is_a_recipe() -> None:
    assert [stage.scheme for stage in load_recipe(EXAMPLE).stages] == ["NVFP4A16", "W8A16"]
