"""`laconic bench serving` in real vLLM: a folder with only a config is served, loaded and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import serving_shapes
from server import ENVIRONMENT, PYTHON, needs_vllm

from laconic.bench.serving import bench_serving
from laconic.bench.serving_options import ServingOptions
from vllm_kernels import EIGHT_BITS

pytestmark = needs_vllm


@EIGHT_BITS
def test_a_shape_is_served_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = serving_shapes.write_folder(tmp_path / "W8A8", "W8A8", "tiny")
    options = ServingOptions(
        batches=(1, 3),
        prompts=(24,),
        new_tokens=6,
        dummy=True,
        dtype="bfloat16",
        engine_args={"enforce-eager": "true"},
        vllm_python=PYTHON,
    )
    reported: list[str] = []
    result = bench_serving([str(folder)], options, report=reported.append)
    assert (result["engine"], result["engine_version"], result["device"]) == ("vllm", "0.32.0", "cpu")
    (model,) = result["models"]
    assert model["kernels"] == ["CPUInt8ScaledMMLinearKernel"]
    assert model["cache_tokens"] > 1000
    assert model["peak_bytes"] > 1 << 30
    assert [(r["batch"], r["prompt"], r["requests"]) for r in model["rows"]] == [(1, 24, 4), (3, 24, 6)]
    for row in model["rows"]:
        assert 0 < row["tpot_ms_p50"] <= row["tpot_ms_p99"]
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
        assert row["decode_tokens_per_second"] > row["tokens_per_second"] > 0
    assert "W8A8: batch 3, prompts of 24" in reported
