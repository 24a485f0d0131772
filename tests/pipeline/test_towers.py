"""Models with a tower for images: the text part is compressed, and the tower travels along in 16 bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import laconic
from artifacts import gptq, press, quantized_linears, rtn, tensors
from every_model import WORKS, check
from shrunk import make_shrunk


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "llava"])
def test_the_text_part_is_compressed_and_transformers_opens_it(model_type: str, text: Path, tmp_path: Path) -> None:
    report = check(model_type, tmp_path, text, ("gptq", "cache", "rtn"))
    assert report.results == dict.fromkeys(("gptq", "cache", "rtn"), (WORKS, ""))
    assert report.opens == "yes"


def test_a_tower_deeper_than_the_text_part_is_left_alone(text: Path, tmp_path: Path) -> None:
    folder = make_shrunk(tmp_path / "model", "gemma3", vision_config={"num_hidden_layers": 5})
    artifact = press(folder, tmp_path / "artifact", gptq("W4A16", group_size=16), text=text)
    names = quantized_linears(laconic.load(artifact.path))
    assert names
    assert all("vision" not in n and "projector" not in n for n in names)
    before, after = tensors(folder), tensors(artifact.path)
    tower = [n for n in before if "vision_tower" in n]
    assert len({n.split(".layers.")[1].split(".")[0] for n in tower if ".layers." in n}) == 5
    assert all(before[n].equal(after[n]) for n in tower)


def test_the_class_that_a_checkpoint_names_says_whether_there_is_a_tower(tmp_path: Path) -> None:
    folder = make_shrunk(tmp_path / "model", "qwen3_5")
    artifact = press(folder, tmp_path / "artifact", rtn("W4A16", group_size=16))
    ignored = artifact.config["quantization_config"]["ignore"]
    assert any("visual" in n for n in ignored)
    assert tensors(folder).keys() & {n for n in tensors(artifact.path) if "visual" in n}
