"""Branches that only a CUDA device takes: what they compute is what the CPU computes. `make test-gpu` runs these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import laconic
from artifacts import Stage, gptq, linear_events, logits, original, press, quantized_linears, rtn, same_bytes, tokens
from laconic.bench.energy import measure_energy
from laconic.bench.semi_structured import Product, cuda_capability, cusparselt, cutlass
from laconic.bench.timing import time_interleaved
from laconic.bench.zeros import to_2_of_4
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text
from laconic.solvers.moments import Moments


def test_rounding_gives_the_bytes_of_the_cpu(cuda: torch.device, llama: Path, tmp_path: Path) -> None:
    for scheme in ("W8A8", "W4A16_ASYM", "FP8_DYNAMIC"):
        stage = rtn(scheme, **({"group_size": 32} if "4" in scheme else {}))
        made = {device: press(llama, tmp_path / scheme / device, stage, device=device) for device in ("cuda", "cpu")}
        assert same_bytes(made["cuda"].path, made["cpu"].path), scheme
    told = made["cuda"].results["compress"]
    assert told["device"] == torch.cuda.get_device_name(cuda)
    assert told["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "stage",
    [
        gptq("W4A16", group_size=32),
        {"method": "awq", "scheme": "W4A16_ASYM", "group_size": 32},
        {"method": "autoround", "scheme": "W4A16", "group_size": 32, "iters": 4},
        {"method": "sparsegpt", "sparsity": 0.5},
    ],
    ids=lambda stage: stage["method"],
)
def test_methods_that_look_at_data_come_as_near_as_on_the_cpu(
    stage: Stage, cuda: torch.device, llama: Path, text: Path, tmp_path: Path
) -> None:
    """Sums in another order choose some codes otherwise, and none that matters."""
    made = {d: press(llama, tmp_path / d, stage, text=text, device=d) for d in ("cuda", "cpu")}
    errors = [sum(e.get("output_error", e["weight_error"]) for e in linear_events(made[d])) for d in ("cuda", "cpu")]
    assert errors[0] > 0
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    expected = logits(original(llama))
    far = [float((logits(laconic.load(made[d].path)) - expected).norm() / expected.norm()) for d in ("cuda", "cpu")]
    assert far[0] == pytest.approx(far[1], rel=0.1)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "W6A6", "FP8_DYNAMIC", "NVFP4A16"])
def test_an_artifact_computes_there_what_it_does_on_the_cpu(
    scheme: str, cuda: torch.device, llama: Path, tmp_path: Path
) -> None:
    stage = rtn(scheme, **({"group_size": 32} if scheme == "W4A16" else {}))
    folder = press(llama, tmp_path / "out", stage, device="cpu").path
    ids = tokens()
    expected = logits(laconic.load(folder, dtype=torch.float32), ids)
    for packed in (False, True):
        model = laconic.load(folder, device="cuda", dtype=torch.float32, packed=packed)
        assert quantized_linears(model)
        # An activation on the edge of two codes may fall either way.
        far = (logits(model, ids.to(cuda)).cpu() - expected).norm() / expected.norm()
        assert float(far) < (1e-3 if "A16" in scheme else 0.03), packed


def test_a_loaded_model_moves_there_and_back(cuda: torch.device, llama: Path, tmp_path: Path) -> None:
    model = laconic.load(press(llama, tmp_path / "out", rtn("W4A16", group_size=32), device="cpu").path)
    before = logits(model)
    there = logits(model.to(cuda), tokens().to(cuda)).cpu()
    assert float((there - before).norm() / before.norm()) < 0.02
    assert torch.equal(logits(model.to("cpu")), before)


def test_moments_of_half_precision_are_summed_in_float32(cuda: torch.device) -> None:
    x = torch.randn(40_000, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = Moments(200, cuda)
    for part in x.split(7_000):
        moments.add(part.to(cuda))
    moments.finish()
    assert moments.H is not None
    expected = x.double().T @ x.double() / len(x)
    assert float((moments.H.cpu().double() - expected).abs().max()) < 1e-5
    assert torch.equal(moments.hi.cpu(), x.float().amax(0))


def test_activations_that_a_stage_sees_are_those_of_the_model(
    cuda: torch.device, llama: Path, text: Path, tmp_path: Path
) -> None:
    """The walk keeps activations on the CPU or the device; static scales are the largest of them either way."""
    stage = rtn("W8A8", dynamic=False)
    scales = [
        {n: float(m.input_scale) for n, m in quantized_linears(laconic.load(artifact.path)).items()}
        for artifact in (
            press(llama, tmp_path / "there", stage, text=text, device="cuda"),
            press(llama, tmp_path / "spilled", stage, text=text, device="cuda", max_memory_gb=1e-6),
            press(llama, tmp_path / "cpu", stage, text=text, device="cpu"),
        )
    ]
    assert scales[0] == scales[1]
    assert scales[0] == pytest.approx(scales[2], rel=0.02)


def test_training_is_in_bfloat16_and_lowers_the_loss(
    cuda: torch.device, llama: Path, text: Path, tmp_path: Path
) -> None:
    training = {
        "method": "lora",
        "rank": 4,
        "learning_rate": 2e-2,
        "max_steps": 6,
        "batch_size": 4,
        "max_seq_length": 32,
        "eval_every": 3,
        "data": [{"dataset": str(text)}],
    }
    artifact = press(llama, tmp_path / "out", training, device="cuda")
    losses = [m["loss"] for m in artifact.results["training-lora"]["held_out"]]
    assert losses[-1] < losses[0]


def test_an_evaluation_there_says_what_one_on_the_cpu_says(
    cuda: torch.device, llama: Path, text: Path, tmp_path: Path
) -> None:
    folder = press(llama, tmp_path / "out", rtn("W4A16", group_size=32), device="cpu").path
    found = [
        evaluate_text(
            folder,
            TextOptions(
                text=str(text), baseline=str(llama), context_length=64, windows=8, dtype="float32", device=device
            ),
        )
        for device in ("cuda", "cpu")
    ]
    for key in ("perplexity", "kl_mean"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-3), key


def test_calls_are_timed_as_one_graph_and_energy_is_counted(cuda: torch.device) -> None:
    x = torch.randn(512, 512, device=cuda)
    small, large = (torch.randn(n, n, device=cuda) for n in (64, 4096))
    times = time_interleaved(
        {"small": [lambda: small @ small] * 3, "large": [lambda: large @ large] * 3}, cuda, rounds=5, seconds=5
    )
    assert all(t.graph for t in times.values())
    assert 0 < times["small"].median < times["large"].median
    energy = measure_energy(lambda: x @ x, cuda, seconds=0.5)
    assert energy is not None
    assert energy.joules > 0


@pytest.mark.parametrize("pack", [cusparselt, cutlass])
def test_sparse_tensor_cores_give_the_dense_product(pack: Callable[[Tensor], Product], cuda: torch.device) -> None:
    if pack is cutlass and cuda_capability(cuda) >= (9, 0):
        pytest.skip("torch has its CUTLASS kernel of 2:4 for compute capability 8 alone")
    W = to_2_of_4(torch.randint(-4, 5, (128, 256), generator=torch.Generator().manual_seed(0)).float())
    W = W.to(cuda, torch.bfloat16)
    x = torch.randint(-4, 5, (24, 256), generator=torch.Generator().manual_seed(1)).to(cuda, torch.bfloat16)
    multiply, nbytes = pack(W)
    # Sums of whole numbers are exact in float32, and rounded once.
    assert torch.equal(multiply(x), (x.float() @ W.float().T).bfloat16())
    assert nbytes < W.nbytes
