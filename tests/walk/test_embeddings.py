"""Quantized heads and embeddings: what is written, read, calibrated on and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import Stage, gptq, linear_events, logits, original, press, rtn, same_bytes, tensors, tokens
from interruptions import Killed
from laconic.artifact.size import measure_size
from laconic.formats.schemes import scheme
from laconic.pipeline.compression import prepare
from laconic.runtime.embedding import QEmbedding
from laconic.walk.plan import with_schemes
from tiny import make_model

HEAD: Stage = gptq("W8A16", targets="lm_head", ignore=[])
TABLE: Stage = rtn("W4A16", group_size=32, targets="Embedding")
BLOCKS: Stage = gptq("W4A16", group_size=32)
FULL = (BLOCKS, HEAD, TABLE)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def with_table(model: Path, artifact: Path) -> torch.nn.Module:
    """The source as transformers opens it, with the decoded table in place of its embeddings."""
    whole, opened = original(model), laconic.load(artifact)
    table = opened.get_input_embeddings()
    assert isinstance(table, QEmbedding)
    whole.get_input_embeddings().weight.data.copy_(table.weight)
    return whole


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "opt"])
def test_a_table_of_codes_gives_the_rows_that_it_decodes_to(arch: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", arch, tied=False)
    artifact = laconic.compress(str(model), {"stages": [TABLE]}, tmp_path / "out")
    opened = laconic.load(artifact.path)
    assert torch.equal(logits(opened), logits(with_table(model, artifact.path)))
    # Tables of positions are of the same class, and stay as they are.
    ignored = config_of(artifact.path)["quantization_config"]["ignore"]
    positions = {"gpt2": {"transformer.wpe"}, "opt": {"model.decoder.embed_positions"}}
    assert {n for n in ignored if n.endswith(("wpe", "positions"))} == positions.get(arch, set())
    assert not torch.equal(logits(opened), logits(original(model)))
    ids = tokens()
    table = opened.get_input_embeddings()
    assert not any(p.is_floating_point() and p.shape[1] == 64 for p in table.parameters())
    half = opened.to(torch.float16).get_input_embeddings()(ids)
    assert half.dtype == torch.float16


def test_engines_find_head_and_embeddings_by_name_and_class(llama: Path, tmp_path: Path) -> None:
    same = rtn("W4A16", group_size=32, targets=["Linear", "lm_head", "Embedding"], ignore=[])
    artifact = laconic.compress(str(llama), {"stages": [same]}, tmp_path / "one")
    (group,) = config_of(artifact.path)["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear", "model.embed_tokens", "lm_head", "Embedding"]
    assert torch.equal(logits(original(artifact.path)), logits(laconic.load(artifact.path)))
    three = laconic.compress(
        str(llama), {"stages": [rtn("W3A16", group_size=32), HEAD | {"method": "rtn"}, TABLE]}, tmp_path / "three"
    )
    groups = config_of(three.path)["quantization_config"]["config_groups"].values()
    assert [g["targets"] for g in groups] == [["model.embed_tokens", "Embedding"], ["lm_head"], ["Linear"]]
    plan = laconic.plan(str(llama), {"stages": [rtn("W3A16", group_size=32), TABLE]}, tmp_path / "x")
    assert (
        "transformers cannot open quantized embeddings beside another scheme; vLLM and laconic.load can"
        in plan.warnings
    )


def test_a_tied_head_and_its_embeddings_are_written_apart(text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", tied=True)
    artifact = press(model, tmp_path / "out", *FULL, text=text)
    assert config_of(artifact.path)["tie_word_embeddings"] is False
    written = tensors(artifact.path)
    assert {"lm_head.weight_packed", "model.embed_tokens.weight_packed"} <= written.keys()
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & written.keys()
    opened = laconic.load(artifact.path)
    shared = tensors(model)["model.embed_tokens.weight"].float()
    for module in (opened.get_input_embeddings(), opened.get_output_embeddings()):
        assert (module.decode(torch.float32) - shared).norm() < 0.2 * shared.norm()
    size = measure_size(artifact.path)
    assert size.covered > 0.99
    assert size.schemes == {"W4A16": 15, "W8A16": 1}


def test_the_blocks_are_calibrated_on_the_table_that_is_served(llama: Path, text: Path, tmp_path: Path) -> None:
    """GPTQ on a model whose embeddings are those of the table: the same codes."""
    artifact = press(llama, tmp_path / "out", TABLE, BLOCKS, text=text)
    decoded = with_table(llama, artifact.path)
    decoded.save_pretrained(tmp_path / "decoded")
    for file in llama.glob("tokenizer*"):
        (tmp_path / "decoded" / file.name).write_bytes(file.read_bytes())
    expected = tensors(press(tmp_path / "decoded", tmp_path / "plain", BLOCKS, text=text).path)
    written = tensors(artifact.path)
    codes = [n for n in expected if n.startswith("model.layers.")]
    assert codes
    assert all(torch.equal(written[n], expected[n]) for n in codes)


def test_the_error_of_the_head_alone_is_in_the_log(llama: Path, text: Path, tmp_path: Path) -> None:
    eight = press(llama, tmp_path / "eight", HEAD, text=text)
    two = press(llama, tmp_path / "two", gptq("W2A16", group_size=32, targets="lm_head", ignore=[]), text=text)
    errors = [event["kl"] for a in (eight, two) for event in linear_events(a) if event["linear"] == "lm_head"]
    assert 0 < errors[0] < 1e-3 < errors[1]


def test_an_interrupted_run_goes_on_with_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    expected = press(llama, tmp_path / "expected", *FULL, text=text)

    def die(event: dict[str, Any]) -> None:
        if event.get("linear") == "model.embed_tokens":
            raise Killed

    recipe = {
        "stages": list(FULL),
        "calibration": {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 32},
    }
    with pytest.raises(Killed):
        laconic.compress(str(llama), recipe, tmp_path / "out", report=die)
    assert same_bytes(laconic.compress(str(llama), recipe, tmp_path / "out").path, expected.path)


@pytest.mark.parametrize(
    ("stages", "tied", "reason"),
    [
        ([gptq("W4A16", group_size=32, targets="Embedding")], False, "reads token ids; give Embedding a stage of rtn"),
        ([{"method": "magnitude", "targets": "Embedding"}], False, "reads token ids; give Embedding a stage of rtn"),
        ([rtn("W8A8", targets="Embedding")], False, "W8A8 does not allow; use W8A16, W4A16 or W2A16"),
        ([rtn("W3A16", group_size=32, targets="Embedding")], False, "W3A16 does not allow"),
        ([TABLE | {"low_rank": 2}], False, r"W4A16 \+ rank 2 does not allow"),
        ([TABLE], True, "shares its weight with lm_head; give lm_head a stage too, which unties the two"),
        ([HEAD], True, "put it in ignore, or give Embedding a stage of rtn, which unties the two"),
        ([TABLE, {"method": "kv_fp8"}], False, "by which a quantized cache recognizes its model"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(
    stages: list[Stage], tied: bool, reason: str, text: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", tied=tied)
    with pytest.raises(ValueError, match=reason):
        press(model, tmp_path / "out", *stages, text=text)


def test_an_allocation_gives_embeddings_only_what_they_can_have(llama: Path, tmp_path: Path) -> None:
    walk = prepare(str(llama), {"stages": [TABLE]}, tmp_path / "out").walk
    assert walk is not None
    assert with_schemes(walk.plan, {"model.embed_tokens": scheme("W8A16")}).schemes
    with pytest.raises(ValueError, match="W3A16 does not allow"):
        with_schemes(walk.plan, {"model.embed_tokens": scheme("W3A16", group_size=32)})
