"""The plan alone says how a linear is stored: a change of it changes what methods are given and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

import laconic
from artifacts import quantized_linears, recipe
from extra_methods import allow_methods
from laconic.formats.schemes import scheme
from laconic.pipeline import walk_step
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.walk.plan import Plan, make_plan, with_schemes

QKV = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]


def test_schemes_that_an_allocation_changes_are_what_is_written(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocated(*arguments: object) -> Plan:
        return with_schemes(make_plan(*arguments), dict.fromkeys(QKV, scheme("W8A16", group_size=32)))

    monkeypatch.setattr(walk_step, "make_plan", allocated)
    for method in ("gptq", "rtn", "awq", "autoround"):
        stage = {"method": method, "scheme": "W4A16", "group_size": 32} | (
            {"iters": 2} if method == "autoround" else {}
        )
        artifact = laconic.compress(str(llama), recipe(stage, text=text), tmp_path / method)
        bits = {n: m.scheme.weights.num_bits for n, m in quantized_linears(laconic.load(artifact.path)).items()}
        assert {n for n, b in bits.items() if b == 8} == set(QKV), method
        assert set(bits.values()) == {4, 8}, method


def test_an_allocation_may_add_side_tensors_and_static_activations(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stage did not ask for is observed, computed and written, since the plan does."""
    eight = replace(scheme("W8A8", dynamic=False), outlier_columns=3, rank=2)

    def allocated(*arguments: object) -> Plan:
        return with_schemes(make_plan(*arguments), dict.fromkeys(QKV, eight))

    monkeypatch.setattr(walk_step, "make_plan", allocated)
    for method in ("rtn", "awq"):
        stage = {"method": method, "scheme": "W4A16", "group_size": 32}
        artifact = laconic.compress(str(llama), recipe(stage, text=text), tmp_path / method)
        linears = quantized_linears(laconic.load(artifact.path))
        changed = {n: m for n, m in linears.items() if n in QKV}
        assert all(m.scheme == eight and float(m.input_scale) > 0 for m in changed.values()), method
        assert all(m.low_rank_left.any() and m.outlier_weight.any() for m in changed.values()), method
        assert {m.scheme.title for n, m in linears.items() if n not in QKV} == {"W4A16"}


def test_an_allocation_may_take_side_tensors_away(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocated(*arguments: object) -> Plan:
        plan = make_plan(*arguments)
        return with_schemes(plan, {n: s.plain for n, s in plan.schemes.items()})

    monkeypatch.setattr(walk_step, "make_plan", allocated)
    stage = {"method": "rtn", "scheme": "W4A16", "group_size": 32, "outlier_ratio": 0.05, "low_rank": 2}
    artifact = laconic.compress(str(llama), recipe(stage), tmp_path / "out")
    assert {m.scheme.title for m in quantized_linears(laconic.load(artifact.path)).values()} == {"W4A16"}


def test_an_allocation_is_checked_as_stages_are(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = laconic.pipeline.compression.prepare(
        str(llama), {"stages": [{"method": "rtn", "scheme": "W4A16", "group_size": 32}]}, tmp_path / "out"
    ).walk.plan
    eight = scheme("W8A16")
    with pytest.raises(ValueError, match=r"linears that read one input must share a scheme, since engines fuse them"):
        with_schemes(plan, {QKV[0]: eight})
    with pytest.raises(ValueError, match=r"group_size 48 does not divide the 64 inputs of model.layers.1.self_attn.k"):
        with_schemes(plan, dict.fromkeys(QKV, scheme("W4A16", group_size=48)))
    with pytest.raises(ValueError, match=r"no stage quantizes lm_head; give a stage targets that include it"):
        with_schemes(plan, {"lm_head": eight})
    with pytest.raises(ValueError, match=r"rtn has no threshold for outlier columns; give their number"):
        with_schemes(plan, dict.fromkeys(QKV, replace(eight, outlier_columns=None)))


def test_an_allocation_is_checked_against_the_deployment(llama: Path, tmp_path: Path) -> None:
    stage = {"method": "rtn", "scheme": "W4A16", "group_size": 32}
    split = laconic.pipeline.compression.prepare(
        str(llama), {"stages": [stage], "tensor_parallel": 2}, tmp_path / "split"
    ).walk.plan
    outputs = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    with pytest.raises(ValueError, match="groups of 64 would reach over two GPUs"):
        with_schemes(split, dict.fromkeys(outputs, scheme("W4A16", group_size=64)))
    cpu = laconic.pipeline.compression.prepare(
        str(llama), {"stages": [stage], "engine": "vllm-cpu"}, tmp_path / "cpu"
    ).walk.plan
    assert with_schemes(cpu, dict.fromkeys(QKV, scheme("W4A8", group_size=32))).schemes[QKV[0]].weights.packed is False


def test_a_stage_may_ask_for_its_linears_one_by_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []

    class Alone(LinearStage):
        """Keeps the shapes that it is given."""

        stacks_linears: ClassVar[bool] = False
        method: Literal["alone"] = "alone"

        def compress(self, task: LinearTask) -> Outcome:
            shapes.append(task.weight.shape)
            return Outcome(task.weight)

    allow_methods(monkeypatch, Alone)
    laconic.compress(str(llama), {"stages": [{"method": "alone", "targets": "re:.*self_attn.*"}]}, tmp_path / "out")
    # Queries have twice as many heads as keys and values.
    assert shapes == [torch.Size(s) for s in ((64, 64), (32, 64), (32, 64), (64, 64))] * 2
