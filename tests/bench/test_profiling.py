"""Traces hold the names of what was worked on, and the table adds up to the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Laconic
from laconic.bench.trace import merge_blocks, read_trace
from tiny import make_model, make_recipe


def annotation(name: str, begin: float, duration: float, ours: bool = True) -> dict[str, Any]:
    full = f"laconic: {name}" if ours else name
    return {"cat": "user_annotation", "name": full, "ts": begin, "dur": duration, "args": {"External id": begin}}


def memory(at: float, total: int, device: int = 0) -> dict[str, Any]:
    return {
        "cat": "cpu_instant_event",
        "name": "[memory]",
        "ts": at,
        "args": {"Total Allocated": total, "Device Type": device},
    }


def write(file: Path, *events: dict[str, Any]) -> Path:
    file.write_text(json.dumps({"traceEvents": events}))
    return file


def test_spans_are_nested_by_time_and_added_up(tmp_path: Path) -> None:
    file = write(
        tmp_path / "trace.json",
        annotation("block 1", 2e6, 1e6),
        annotation("block 0", 0, 2e6),
        annotation("rtn", 0.5e6, 1e6),
        annotation("torch's own", 0.6e6, 1e5, ours=False),
        annotation("observe", 0.5e6, 0.25e6),
        annotation("observe", 0.75e6, 0.25e6),
        annotation("rtn", 2.5e6, 0.5e6),
    )
    rows = {row.path: row for row in read_trace(file)}
    assert list(rows) == [
        ("block 0",),
        ("block 0", "rtn"),
        ("block 0", "rtn", "observe"),
        ("block 1",),
        ("block 1", "rtn"),
    ]
    assert (rows["block 0",].seconds, rows["block 0",].own_seconds) == (2, 1)
    observed = rows["block 0", "rtn", "observe"]
    assert (observed.count, observed.seconds, observed.peak_bytes, observed.gpu_seconds) == (2, 0.5, None, None)
    kinds = {row.path: row for row in merge_blocks(list(rows.values()))}
    assert (kinds["blocks",].count, kinds["blocks",].seconds) == (2, 3)
    assert (kinds["blocks", "rtn"].seconds, kinds["blocks", "rtn"].own_seconds) == (1.5, 1)


def test_the_peak_is_the_most_while_it_lasted_and_a_gpus_where_there_is_one(tmp_path: Path) -> None:
    spans = annotation("block 0", 10, 10), annotation("block 1", 20, 10)
    on_cpu = memory(1, 5), memory(12, 90), memory(13, 7), memory(22, 30)
    rows = read_trace(write(tmp_path / "a.json", *spans, *on_cpu))
    # What was there before a span began is there in it.
    assert [row.peak_bytes for row in rows] == [90, 30]
    gpu = {**annotation("block 0", 11, 4e6), "cat": "gpu_user_annotation", "args": {"External id": 10}}
    rows = read_trace(write(tmp_path / "b.json", *spans, *on_cpu, memory(14, 3, device=1), gpu))
    assert [row.peak_bytes for row in rows] == [3, 3]
    assert [row.gpu_seconds for row in rows] == [4, 0]


@pytest.mark.parametrize("text", ["{", "{}", '{"traceEvents": []}'])
def test_what_is_no_trace_of_ours_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match="write one with `laconic profile`"):
        read_trace(tmp_path / "trace.json")


def test_a_compression_is_traced_by_block_and_stage(laconic: Laconic, text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    recipe = make_recipe(
        tmp_path / "recipe.yaml",
        {"method": "smoothquant"},
        {"method": "gptq", "scheme": "W8A8"},
        model=str(model),
        calibration=calibration,
    )
    trace, plain, traced = (tmp_path / n for n in ("trace.json", "plain", "traced"))
    said = laconic("profile", "compress", recipe, "-o", traced, "--trace", trace, "--blocks", 2, "--each", "--json")
    rows = {tuple(row["path"]): row for row in json.loads(said.out)["spans"]}
    for i in range(2):
        for inside in (("smoothquant",), ("gptq",), ("gptq", "observe"), ("gptq", "compress down_proj"), ("write",)):
            assert (f"block {i}", *inside) in rows
    assert ("block 2",) not in rows
    assert all(row["peak_bytes"] > 0 for row in rows.values())
    for path, row in rows.items():
        below = sum(r["seconds"] for p, r in rows.items() if len(p) == len(path) + 1 and p[: len(path)] == path)
        assert below + row["own_seconds"] == pytest.approx(row["seconds"], rel=1e-6)
    # Looking on changes nothing.
    assert laconic("compress", recipe, "-o", plain).code == 0
    for file in plain.glob("*.safetensors"):
        assert file.read_bytes() == (traced / file.name).read_bytes()


def test_a_generation_is_traced_by_block(laconic: Laconic, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    asked = ["profile", "generate", model, "--trace", tmp_path / "t.json", "--prompt", 8, "--tokens", 4]
    rows = {tuple(row["path"]): row for row in json.loads(laconic(*asked, "--each", "--json").out)["spans"]}
    # The prompt, and a token after another.
    assert rows["generate", "block 1", "self_attn"]["count"] == 4
    assert rows["generate", "block 0", "mlp"]["seconds"] <= rows["generate", "block 0"]["seconds"]
    shown = laconic(*asked)
    assert "blocks" in shown.out
    assert "self_attn" in shown.out


def test_a_prompt_too_long_is_told(laconic: Laconic, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", max_position_embeddings=32)
    said = laconic("profile", "generate", model, "--prompt", 30, "--tokens", 4, "--trace", tmp_path / "t.json")
    assert said.complaint == "--prompt 30 and --tokens 4 are more than the model's context of 32; lower one"


def test_nsight_needs_a_gpu(laconic: Laconic, tmp_path: Path) -> None:
    said = laconic("profile", "generate", make_model(tmp_path / "model"), "--nvtx")
    assert said.complaint == "--nvtx names ranges for Nsight, which needs a CUDA device; leave it out"


def test_a_trace_that_cannot_be_written_is_told_first(laconic: Laconic, tmp_path: Path) -> None:
    said = f"{tmp_path} is a folder; choose another name"
    assert laconic("profile", "generate", "nowhere", "--trace", tmp_path).complaint == said
    assert laconic("profile", "compress", "nowhere", "--recipe", "rtn-w4a16", "--trace", tmp_path).complaint == said
    assert not list(tmp_path.iterdir())
