"""`laconic bench sparsity` on tiny shapes and models: what is timed is right, and what is told is what was timed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig

from artifacts import logits, original, press, rtn
from commands import Laconic
from laconic.bench.forms import forms_for
from laconic.bench.options import SparsityOptions
from laconic.bench.shapes import PRESETS, linear_shapes, narrowed, scaled
from laconic.bench.sparse_models import count_weights, random_model, with_sparse_kernels, with_zeros
from laconic.bench.sparsity import SPARSE, bench_sparsity
from laconic.bench.verdict import busy_verdict, linear_verdicts
from laconic.bench.zeros import to_2_of_4, to_zero_blocks

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"rounds": 3, "seconds": 0.0, "device": "cpu"}


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def blocks_model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with half of its blocks zero."""
    return pruned(llama, tmp_path_factory.mktemp("blocks") / "model", lambda W: to_zero_blocks(W, 16, 0.5))


def pruned(source: Path, target: Path, put: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    held = load_file(file)
    save_file({n: put(t) if "proj" in n else t for n, t in held.items()}, file, {"format": "pt"})
    return target


# --- linears ---


@pytest.mark.parametrize("form", forms_for(CPU, torch.float32, (0.5, 0.25), 16), ids=lambda f: f.name)
def test_every_form_multiplies_by_the_weight_it_stands_for(form: Any) -> None:
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    if form.kind == "2:4":
        with pytest.raises(RuntimeError, match="2:4 products need an NVIDIA GPU"):
            form.pack(W)
        return
    weight = form.pack(W)
    torch.testing.assert_close(weight.multiply(form.cast(x)), F.linear(x, weight.dense), rtol=1e-4, atol=1e-4)
    zeros = 1 - int((weight.dense != 0).sum()) / W.numel()
    assert zeros == pytest.approx(form.sparsity, abs=0.05)
    if form.kind != "structured":
        assert weight.dense.shape == W.shape


def test_linears_are_told_beside_dense_and_what_is_not_here_says_why() -> None:
    result = bench_sparsity(
        options=SparsityOptions(shapes="64x32,32x64", batches=(3, 1), block=16, sparsities=(0.5,), **QUICK)
    )
    rows = result["linears"]
    dense = {(tuple(r["shape"]), r["batch"]): r for r in rows if r["kind"] == "dense"}
    assert set(dense) == {((64, 32), 1), ((64, 32), 3), ((32, 64), 1), ((32, 64), 3)}
    for row in rows:
        baseline = dense[tuple(row["shape"]), row["batch"]]
        if row["kind"] == "2:4":
            assert row["unavailable"] == "2:4 products need an NVIDIA GPU"
            continue
        assert row["speedup"] == pytest.approx(baseline["ms_p50"] / row["ms_p50"])
        assert row["ms_best"] <= row["ms_p50"] <= row["ms_p99"]
        kept = 1 if row["kernel"] in ("torch", "torch, dense") else 0.5
        assert row["flops"] == kept * 2 * row["batch"] * 64 * 32
    assert dense[(64, 32), 1]["weight_bytes"] == 64 * 32 * 4
    (zeros,) = [s for s in result["summary"] if s.startswith("unstructured 50%, float32, torch, dense")]
    assert "no engine here uses such zeros" in zeros
    assert sum("not measured (2:4 products need an NVIDIA GPU)" in s for s in result["summary"]) == 2


def row(form: str, batch: int, speedup: float | None, **keys: Any) -> dict[str, Any]:
    return {"form": form, "kind": form, "kernel": "k", "dtype": "f", "batch": batch, "speedup": speedup} | keys


def test_a_verdict_is_the_mean_over_shapes_and_says_where_there_is_no_gain() -> None:
    rows = [
        row("dense", 1, 1.0),
        row("a", 1, 2.0), row("a", 1, 0.5), row("a", 9, 4.0), row("a", 9, 1.0),
        row("b", 1, 1.0), row("b", 9, 0.5),
        row("c", 1, 0.5), row("c", 9, 1.5),
    ]  # fmt: skip
    assert list(linear_verdicts(rows)) == [
        "a: 1.00x at 1, 2.00x at 9 tokens",
        "b: 1.00x at 1, 0.50x at 9 tokens: no speed-up",
        "c: 0.50x at 1, 1.50x at 9 tokens; slower than dense at 1",
    ]


def test_a_busy_machine_is_told() -> None:
    assert list(busy_verdict([{"ms_p50": 10.0, "cpu_ms_p50": 19.0}, {"unavailable": "here"}])) == []
    assert list(busy_verdict([{"ms_p50": 10.0, "cpu_ms_p50": None}])) == [], "a GPU's times have no such thing"
    (said,) = busy_verdict([{"ms_p50": 10.0, "cpu_ms_p50": 3.0}, {"ms_p50": 10.0, "cpu_ms_p50": 5.0}])
    assert said.startswith("the machine was busy: this process ran 40% of the time; ")


# --- shapes ---


def test_shapes_are_what_engines_multiply() -> None:
    assert linear_shapes(PRESETS["llama-3-8b"]) == {
        (6144, 4096): "q_proj+k_proj+v_proj",
        (4096, 4096): "o_proj",
        (28672, 4096): "gate_proj+up_proj",
        (4096, 14336): "down_proj",
    }


def test_a_scaled_model_keeps_its_proportions_and_a_narrowed_one_loses_its_share() -> None:
    wide = scaled(tiny_config(), 320)
    assert (wide.hidden_size, wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (320, 20, 10, 16)
    assert wide.intermediate_size == 640
    thin = narrowed(wide, 0.2)
    assert (thin.hidden_size, thin.num_attention_heads, thin.num_key_value_heads, thin.head_dim) == (320, 16, 8, 16)
    assert thin.intermediate_size == 512
    before, after = (random_model(c, CPU, torch.float32) for c in (wide, thin))
    ids = torch.arange(6)[None]
    assert before(ids).logits.shape == after(ids).logits.shape
    head = wide.vocab_size * wide.hidden_size
    assert count_weights(after).weights - head == pytest.approx(0.8 * (count_weights(before).weights - head))


# --- models ---


def test_sparse_kernels_compute_what_dense_ones_do() -> None:
    model = with_zeros(random_model(tiny_config(), CPU, torch.float32), lambda W: to_zero_blocks(W, 16, 0.5))
    fast, used = with_sparse_kernels(model)
    assert sum(used.values()) == 14, "all linears of the blocks"
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    dense, sparse = count_weights(model), count_weights(fast, used)
    assert (sparse.weights, sparse.nonzero) == (dense.weights, dense.nonzero)
    assert sparse.nbytes < 0.6 * dense.nbytes


def test_2_of_4_has_no_kernel_on_a_cpu() -> None:
    model = with_zeros(random_model(tiny_config(), CPU, torch.float32), to_2_of_4)
    fast, used = with_sparse_kernels(model)
    assert fast is model
    assert used == {}


def test_folders_are_measured_beside_the_original_and_kept(llama: Path, blocks_model: Path, tmp_path: Path) -> None:
    plain = press(llama, tmp_path / "w8", rtn("W8A16"))
    blocky = press(blocks_model, tmp_path / "blocky", rtn("W8A16"))
    result = bench_sparsity(
        [str(plain.path), str(blocks_model), str(blocky.path)],
        SparsityOptions(baseline=str(llama), prompt=8, parts=["models"], **QUICK),
    )
    names = [r["name"] for r in result["models"]]
    assert names == ["llama", "w8", "model", f"model, {SPARSE}", "blocky", f"blocky, {SPARSE}"]
    assert sum(result["models"][-1]["sparse_kernels"].values()) == 14, "zeros outlive rounding, and kernels find them"
    rows = dict(zip(names, result["models"], strict=True))
    weights = sum(m.weight.numel() for m in original(llama).modules() if isinstance(m, torch.nn.Linear))
    assert rows["llama"]["linear_weights"] == weights
    assert rows["llama"]["flops_per_token"] == 2 * weights
    assert rows["model"]["flops_per_token"] == 2 * weights
    assert rows[f"model, {SPARSE}"]["flops_per_token"] == 2 * rows["model"]["linear_nonzero"]
    assert rows["model"]["gone"] == pytest.approx(1 - rows["model"]["linear_nonzero"] / weights, abs=0.01)
    for r in rows.values():
        for phase, tokens in (("prefill", 8), ("decode", 1)):
            assert r[phase]["tokens_per_second"] == pytest.approx(1e3 * tokens / r[phase]["ms_p50"])
            assert r[phase]["speedup"] == pytest.approx(rows["llama"][phase]["ms_p50"] / r[phase]["ms_p50"])
    kept = plain.results["bench-sparsity-cpu"]
    assert [r["name"] for r in kept["models"]] == ["llama", "w8"]
    assert (kept["model"], kept["baseline"]) == (str(plain.path), str(llama))
    assert not (blocks_model / "results").exists(), "a plain model is left alone"


def test_zeros_that_nothing_uses_are_said_to_buy_nothing(llama: Path, tmp_path: Path) -> None:
    zeros = pruned(llama, tmp_path / "zeros", to_2_of_4)
    result = bench_sparsity([str(llama), str(zeros)], SparsityOptions(prompt=8, parts=["models"], **QUICK))
    said = result["summary"][0]
    assert "of its linear weights are zeros, which dense kernels multiply as any number" in said


@pytest.mark.slow
def test_fewer_heads_and_channels_decode_faster() -> None:
    """A fifth of a model whose linears dominate: the aim is 1.15x, here with room for a busy machine."""
    demo = Path(__file__).parents[2] / "models" / "demo"
    result = bench_sparsity(
        [str(demo)],
        SparsityOptions(
            scaled_to=1280,
            sparsities=(0.2,),
            block=64,
            prompt=128,
            kinds=["structured"],
            parts=["models"],
            rounds=10,
            device="cpu",
        ),
    )
    (thin,) = [r for r in result["models"] if r["name"] == "structured 20%"]
    assert thin["prefill"]["cpu_speedup"] > 1.05
    assert thin["decode"]["cpu_speedup"] > 1.05


# --- the command ---


def test_the_command_prints_and_writes(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    asked = ["bench", "sparsity", llama, "--scaled", 128, "--block", 32, "--batch", "1,2", "--prompt", 8]
    ran = laconic(*asked, "--rounds", 3, "--seconds", 0, "--dtype", "float32", "-o", tmp_path / "t" / "bench.md")
    assert ran.code == 0, ran.err
    written = (tmp_path / "t" / "bench.md").read_text()
    for text in (ran.out, written):
        assert "no engine here uses such zeros" in text
        assert "not reported" in text or "RAPL" in text
        assert "structured 50%" in text
    assert f"laconic bench sparsity {llama} --scaled 128" in written
    assert "| original, hidden 128 | 0% |" in written


def test_the_command_in_json(laconic: Laconic, tmp_path: Path) -> None:
    asked = ["bench", "sparsity", "--shapes", "32x32", "--block", 16, "--batch", 1, "--rounds", 3, "--seconds", 0]
    ran = laconic(*asked, "--json", "-o", tmp_path / "b.json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads((tmp_path / "b.json").read_text())
    assert {r["linear"] for r in json.loads(ran.out)["linears"]} == {"32x32"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--shapes", "12by3"],
            "--shapes 12by3 is not a shape; write outputs x inputs, as in --shapes 4096x14336,4096x4096",
        ),
        (["--sparsity", "1"], "--sparsity 1.0 is not between 0 and 1; give the share to prune, as in 0.5"),
        (["--sparsity", "half"], "--sparsity half is no list of numbers; write it as in --sparsity 0.5,0.8"),
        (["--batch", "0"], "--batch 0 is less than 1"),
        (["--block", "48"], "--block 48 is not a power of two from 16 on; take 32, 64 or 128"),
        (["--kinds", "1:2"], "--kinds 1:2 is not one of structured, unstructured, block, 2:4"),
        (["--measure", "energy"], "--measure energy is not one of linears, models"),
        (["--measure", "models"], "name models to measure: folders, or one of llama-3-8b, llama-3.2-1b"),
        (["--seconds", "-1"], "--seconds -1 is not 0 or more; give a time in seconds"),
        (["--seconds", "nan"], "--seconds nan is not 0 or more; give a time in seconds"),
        (["--baseline", "x"], "--baseline goes with a model; name one before it"),
        (["--shapes", "4x4", "--scaled", "64"], "--scaled goes with a model; name one before it"),
        (["--dtype", "int8"], "--dtype int8 is not one of float32, bfloat16, float16"),
        (
            ["gone", "--shapes", "4x4"],
            "no model folder 'gone'; give a folder with config.json, or a Hub name like owner/model",
        ),
        (
            ["llama-3-8b", "--baseline", "x"],
            "a preset, or a model with --scaled, has random weights; name no other model beside it",
        ),
        (
            ["-o", "bench.txt"],
            "--output bench.txt is neither Markdown nor JSON; give it a name that ends in .md or .json",
        ),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_mistake_is_one_line(laconic: Laconic, arguments: list[str], complaint: str) -> None:
    assert laconic("bench", "sparsity", *arguments).complaint == complaint


def test_mistakes_about_a_model(laconic: Laconic, llama: Path) -> None:
    wide = laconic("bench", "sparsity", llama, "--scaled", 100, "--measure", "models")
    assert (
        wide.complaint
        == "--scaled 100 is not a multiple of 32, the width of a group of heads of this model; choose one"
    )
    long = laconic("bench", "sparsity", llama, "--prompt", 256, "--measure", "models")
    assert long.complaint == "--prompt 256 leaves no room in the context of 256 of llama; lower it"


def test_what_is_wrong_with_a_model_is_told_before_anything_is_measured(
    laconic: Laconic, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured already")

    monkeypatch.setattr("laconic.bench.sparsity.bench_linears", measured)
    monkeypatch.setattr("laconic.bench.sparsity._folder_candidates", measured)
    artifact = press(llama, tmp_path / "w8", rtn("W8A16")).path
    shutil.rmtree(artifact / "results")
    (artifact / "results").write_text("in the way")
    (tmp_path / "file").touch()
    for arguments, complaint in (
        ([llama, "gone"], "no model folder 'gone'; give a folder with config.json, or a Hub name like owner/model"),
        ([llama, "--prompt", 256], "--prompt 256 leaves no room in the context of 256 of llama; lower it"),
        (
            [llama, "--scaled", 96],
            "--block 64 does not divide the 48 x 96 of a linear of this model; take a smaller one, another --scaled, "
            "or leave block out of --kinds",
        ),
        ([llama, "--scaled", 128, "--sparsity", 0.01], "a share of 0.01 cannot be cut from 4 groups of heads and 256 "),
        (
            [llama, artifact],
            f"{artifact}/results/result.json cannot be written: {artifact}/results is no folder that you may write to",
        ),
        (
            [llama, "-o", tmp_path / "file" / "b.md"],
            f"{tmp_path}/file/b.md cannot be written: {tmp_path}/file is no folder that you may write to",
        ),
    ):
        given = [] if "--prompt" in arguments else ["--prompt", 8]
        assert laconic("bench", "sparsity", *arguments, *given).complaint.startswith(complaint)


def test_an_artifact_that_is_its_own_original_keeps_nothing(llama: Path, tmp_path: Path) -> None:
    alone = press(llama, tmp_path / "w8", rtn("W8A16"))
    result = bench_sparsity([str(alone.path)], SparsityOptions(prompt=8, parts=["models"], **QUICK))
    assert (
        "was compared with itself, so no result is saved in it; name the original by --baseline"
        in result["summary"][-1]
    )
    assert alone.results.keys() == {"compress"}
