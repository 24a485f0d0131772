"""Group sizes that `auto` chooses, and splits over GPUs that are refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from artifacts import Stage, logits, original, quantized_linears, recipe, rtn, tensors
from laconic.pipeline.compression import prepare
from laconic.recipe import gallery, load_recipe
from laconic.walk.deployment import row_parallel
from laconic.walk.plan import Plan
from tiny import make_model

# As SmolLM2-135M has it: 576 inputs, of which 128 is no divisor.
ODD = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("odd"), intermediate_size=256, **ODD)


def planned(model: Path, *stages: Stage, **keys: Any) -> Plan:
    walk = prepare(str(model), recipe(*stages, **keys), model.parent / "out").walk
    assert walk is not None
    return walk.plan


def sizes(plan: Plan) -> dict[str, int | None]:
    """The group size of each linear of the first block, by the last part of its name."""
    first = plan.anatomy.block_name(0)
    return {n.rpartition(".")[2]: s.weights.tiling.group_size for n, s in plan.schemes.items() if n.startswith(first)}


def test_auto_takes_the_largest_group_that_divides_each_linear(odd: Path) -> None:
    chosen = sizes(planned(odd, rtn("W4A16", group_size="auto")))
    assert {n for n, size in chosen.items() if size == 64} == {*(f"{n}_proj" for n in "qkvo"), "gate_proj", "up_proj"}
    assert chosen["down_proj"] == 128


def test_auto_falls_back_to_one_scale_a_channel(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", intermediate_size=72)
    chosen = sizes(planned(model, rtn("W4A16_ASYM", group_size="auto")))
    assert chosen.pop("down_proj") is None
    assert {*chosen.values()} == {64}


def test_auto_gives_the_experts_of_a_layer_one_size(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "qwen3_moe", moe_intermediate_size=96)
    plan = planned(model, rtn("W4A16", group_size="auto"))
    of_experts = {s.weights.tiling.group_size for n, s in plan.schemes.items() if ".experts." in n}
    assert of_experts == {32}
    assert sizes(plan)["q_proj"] == 64


def test_what_auto_chooses_is_what_is_written_and_read(odd: Path, tmp_path: Path) -> None:
    artifact = laconic.compress(str(odd), {"stages": [rtn("W4A16", group_size="auto")]}, tmp_path / "out")
    opened = quantized_linears(laconic.load(artifact.path))
    assert Counter(m.scheme.weights.tiling.group_size for m in opened.values()) == {64: 12, 128: 2}


def test_a_size_that_does_not_divide_is_refused_and_names_auto(odd: Path) -> None:
    for stage in (rtn("W4A16"), rtn("W4A16", group_size=128)):
        with pytest.raises(
            ValueError, match=r"group_size 128 does not divide the 192 inputs .* use group_size: auto, "
        ):
            planned(odd, stage)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"scheme": "W4A16", "strategy": "channel"}, "group_size auto contradicts strategy 'channel'"),
        ({"scheme": "W8A8"}, "W8A8 has no groups: leave group_size out"),
        ({"scheme": "NVFP4A16"}, "NVFP4A16 is groups of 16: leave group_size and strategy out"),
    ],
    ids=str,
)
def test_auto_is_refused_where_nothing_is_to_be_chosen(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_recipe({"stages": [{"method": "rtn", "group_size": "auto", **keys}]})


@pytest.mark.parametrize("name", gallery())
def test_every_recipe_of_the_gallery_takes_a_model_that_128_does_not_divide(name: str, odd: Path, text: Path) -> None:
    stages = load_recipe(name).model_dump(mode="json")["stages"]
    walks = [s for s in stages if s["method"] not in ("llm_pruner", "lora") and s.get("scheme") != "FP8_BLOCK"]
    if walks:
        planned(odd, *walks, text=text)


def test_row_parallel_linears_are_those_that_write_to_the_residual_stream(llama: Path) -> None:
    plan = planned(llama, rtn("W8A8"))
    leaves = {n.rpartition(".")[2] for n in row_parallel(plan.anatomy, plan.linears)}
    assert leaves == {"o_proj", "down_proj"}


SPLIT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 256}


@pytest.mark.parametrize(
    ("gpus", "stage", "reason"),
    [
        (2, rtn("W4A16", group_size=64), None),
        (4, rtn("W4A16", group_size="auto"), None),
        (8, rtn("W8A8"), None),
        (3, rtn("W8A8"), "does not divide the 8 attention heads of the model; use 1, 2, 4, 8$"),
        (
            4,
            rtn("W4A16", group_size=128),
            r"4 gives a GPU 64 inputs of model.layers.0.self_attn.o_proj, and groups of 128 would reach over two GPUs; "
            "use group_size: auto, one of 64, 32, -1, or tensor_parallel: 2$",
        ),
        (
            4,
            rtn("FP8_BLOCK"),
            r"4 gives a GPU 64 outputs of .*q_proj, and 128 of them are stored together; .* tensor_parallel: 2$",
        ),
        (2, rtn("W6A6"), None),
        (2, {"method": "kivi", "residual_length": 0}, r"stages.0 \(kivi\) is served on one GPU alone"),
        (
            2,
            {"method": "llm_pruner", "heads": 4, "keep_first": 0, "keep_last": 0},
            r"stages.0 \(llm_pruner\): tensor_parallel 2 needs widths that it",
        ),
    ],
    ids=str,
)
def test_splits_over_gpus(tmp_path: Path, text: Path, gpus: int, stage: Stage, reason: str | None) -> None:
    model = make_model(tmp_path / "m", intermediate_size=512, **SPLIT)
    if reason is None:
        plan = planned(model, stage, tensor_parallel=gpus)
        assert plan.schemes
        return
    with pytest.raises(ValueError, match=reason):
        planned(model, stage, tensor_parallel=gpus, text=text)


def test_codes_of_one_word_stay_on_one_gpu(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", intermediate_size=528, **SPLIT)
    reason = r"8 gives a GPU 66 inputs of .*down_proj, and 16 of them are stored together; use another scheme there, "
    with pytest.raises(ValueError, match=reason):
        planned(model, rtn("W2A16", group_size=-1), tensor_parallel=8)


def test_auto_divides_the_inputs_of_each_gpu(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", intermediate_size=512, **SPLIT)
    chosen = sizes(planned(model, rtn("W4A16", group_size="auto"), tensor_parallel=4))
    assert (chosen["o_proj"], chosen["q_proj"], chosen["down_proj"]) == (64, 128, 128)


def test_key_value_heads_are_copied_where_there_are_fewer_than_gpus(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", intermediate_size=512, **SPLIT | {"num_key_value_heads": 2})
    assert planned(model, rtn("W8A8"), tensor_parallel=4).schemes
    odd_heads = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 384}
    three = make_model(tmp_path / "three", intermediate_size=512, **SPLIT | odd_heads)
    with pytest.raises(ValueError, match=r"4 neither divides the 3 key-value heads of the model nor is a multiple"):
        planned(three, rtn("W8A8"), tensor_parallel=4)


def test_w4a8_is_packed_for_gpus_and_one_code_a_byte_for_cpus(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", dtype=torch.float32)
    read = {}
    for engine, leaf in (("vllm", "weight_packed"), ("vllm-cpu", "weight")):
        stage = rtn("W4A8", group_size=32)
        artifact = laconic.compress(str(model), {"stages": [stage], "engine": engine}, tmp_path / engine)
        assert f"model.layers.0.mlp.down_proj.{leaf}" in tensors(artifact.path)
        (event,) = [e for e in artifact.log if e["event"] == "layout"]
        assert event["storage"] == artifact.config["quantization_config"]["format"]
        read[engine] = [logits(laconic.load(artifact.path)), logits(original(artifact.path))]
    for packed, wide in zip(read["vllm"], read["vllm-cpu"], strict=True):
        assert torch.equal(packed, wide)
