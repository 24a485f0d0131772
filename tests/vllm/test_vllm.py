"""Real vLLM opens what we write, and its log-probabilities are those of our own reading of the same file."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from server import ENVIRONMENT, PYTHON, ROOT, job, needs_vllm, run

import laconic
from artifacts import tensors
from laconic.checkpoint.source import load_tokenizer
from laconic.evaluation.fidelity import log_probabilities
from tiny import MIXTURES, make_model
from vllm_kernels import BLOCKS_OF_FP8, EIGHT_BITS, EXPERTS, FOUR_BITS

pytestmark = needs_vllm

DEMO = ROOT / "models" / "demo"
SOURCE = '''
import heapq

class PriorityQueue:
    """A queue that gives back the smallest item first."""

    def __init__(self, items=()):
        self._items = list(items)
        heapq.heapify(self._items)

    def push(self, item):
        heapq.heappush(self._items, item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty queue")
        return heapq.heappop(self._items)
'''


@dataclass(frozen=True)
class Served:
    """What vLLM said of each prompt: its greedy tokens, and the log-probability of every prompt token but the first."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]


def compressed(tmp_path: Path, *stages: dict[str, Any], **keys: Any) -> Path:
    text = tmp_path / "calibration.txt"
    text.write_text(SOURCE * 40)
    recipe = {
        "calibration": {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 256},
        "stages": list(stages),
        **keys,
    }
    return laconic.compress(str(DEMO), recipe, tmp_path / "artifact").path


def prompts(length: int, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer(SOURCE * 4, add_special_tokens=False).input_ids
    return [[tokenizer.bos_token_id, *ids[i * 7 : i * 7 + length - 1]] for i in range(count)]


def serve(folder: Path, asked: list[list[int]], dtype: str, *, adapter: Path | None = None, **more: Any) -> Served:
    """What vLLM said. adapter: of LoRA, to answer with; log-probabilities are then those of the greedy tokens."""
    sampling = {"max_tokens": 16, "logprobs": 1, "prompt_logprobs": None if adapter else 1}
    (result,) = run(job(folder, [asked], sampling, dtype=dtype, adapter=adapter, **more))
    assert "error" not in result, result["error"]
    outputs = result["rounds"][0]
    told = "logprobs" if adapter else "prompt_logprobs"
    return Served(asked, [o["tokens"] for o in outputs], [torch.tensor(o[told]) for o in outputs])


def our_logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    found = log_probabilities(model, torch.tensor([ids]))
    return found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def our_greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(log_probabilities(model, torch.tensor([[*ids, 0]]))[-1].argmax()))
    return ids[-count:]


WEIGHT_ONLY = {
    "W4A16 group 128": {"scheme": "W4A16"},
    "W4A16 group 32": {"scheme": "W4A16", "group_size": 32},
    "W4A16 channel": {"scheme": "W4A16", "group_size": -1},
    "W4A16 asymmetric": {"scheme": "W4A16_ASYM"},
    "W4A16 asymmetric channel": {"scheme": "W4A16_ASYM", "group_size": -1},
}


@FOUR_BITS
@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_weight_only_schemes_serve_with_our_log_probabilities(tmp_path: Path, scheme: dict[str, Any]) -> None:
    folder = compressed(tmp_path, {"method": "gptq", **scheme})
    served = serve(folder, prompts(96, 4), "bfloat16")
    ours, original = (laconic.load(m, dtype=torch.bfloat16) for m in (folder, DEMO))
    far = near = 0.0
    for ids, logprobs in zip(served.prompts, served.logprobs, strict=True):
        near += float((our_logprobs(ours, ids) - logprobs).abs().mean()) / len(served.prompts)
        far += float((our_logprobs(original, ids) - logprobs).abs().mean()) / len(served.prompts)
    # Two implementations in bf16 differ by its rounding; the artifact differs from the original by much more.
    assert near < 0.04
    assert near < far / 2
    same = [a == b for ids, t in zip(served.prompts, served.tokens, strict=True)
            for a, b in zip(our_greedy(ours, ids, 8), t[:8], strict=True)]  # fmt: skip
    assert sum(same) >= 0.8 * len(same)


ROUNDED = [
    pytest.param({"scheme": "W8A8"}, id="W8A8 dynamic", marks=EIGHT_BITS),
    pytest.param({"scheme": "W8A8", "dynamic": False}, id="W8A8 static", marks=EIGHT_BITS),
    pytest.param({"scheme": "W8A8", "strategy": "tensor"}, id="W8A8 tensor", marks=EIGHT_BITS),
    pytest.param({"scheme": "FP8_DYNAMIC"}, id="FP8 dynamic"),
]


@pytest.mark.parametrize("scheme", ROUNDED)
def test_schemes_with_rounded_activations_serve_exactly(tmp_path: Path, scheme: dict[str, Any]) -> None:
    """Served in float32, so that only rounding is left. A value that falls on the other side of one rounding changes
    all that follows it, so prompts are short and most, not all, must agree; when they do it is to the last digit."""
    folder = compressed(tmp_path, {"method": "rtn", **scheme})
    served = serve(folder, prompts(5, 32), "float32")
    ours = laconic.load(folder, dtype=torch.float32)
    differences = torch.stack(
        [(our_logprobs(ours, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    )
    assert differences.median() < 1e-4
    assert (differences < 1e-3).float().mean() > 0.6
    assert differences.mean() < 0.05


def test_vllms_emulation_of_nvfp4_is_ours(tmp_path: Path) -> None:
    """Its CPU build has no kernel for FP4, but reads and fuses the weights, and has the arithmetic in plain torch."""
    folder = compressed(tmp_path, {"method": "gptq", "scheme": "NVFP4"})
    served = serve(folder, prompts(5, 32), "float32", emulate=True)
    ours = laconic.load(folder, dtype=torch.float32)
    differences = torch.stack(
        [(our_logprobs(ours, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    )
    assert differences.median() < 1e-4
    assert (differences < 1e-3).float().mean() > 0.6


def test_w4a8_serves_close_to_our_simulation(tmp_path: Path) -> None:
    """The CPU kernel rounds activations on a grid of its own (with a zero point), so it agrees only roughly."""
    folder = compressed(tmp_path, {"method": "gptq", "scheme": "W4A8", "group_size": 32}, engine="vllm-cpu")
    served = serve(folder, prompts(96, 4), "bfloat16")
    ours = laconic.load(folder, dtype=torch.bfloat16)
    near = [(our_logprobs(ours, i) - p).abs().mean() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    assert sum(near) / len(near) < 0.12


@FOUR_BITS
@EIGHT_BITS
def test_mixed_precision_serves(tmp_path: Path) -> None:
    folder = compressed(
        tmp_path,
        {"method": "gptq", "scheme": "W4A16", "ignore": ["lm_head", "re:.*down_proj"]},
        {"method": "rtn", "scheme": "W8A8", "targets": "re:.*down_proj"},
    )
    served = serve(folder, prompts(96, 2), "bfloat16")
    ours = laconic.load(folder, dtype=torch.bfloat16)
    near = [(our_logprobs(ours, i) - p).abs().mean() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    assert sum(near) / len(near) < 0.08


NATIVE: dict[str, list[dict[str, Any]]] = {
    "LLM.int8": [{"method": "llm_int8", "threshold": 3.0, "targets": ["Linear", "lm_head"], "ignore": []}],
    "W8A8 static, outliers": [{"method": "rtn", "scheme": "W8A8", "dynamic": False, "outlier_ratio": 0.02}],
    "W6A6": [{"method": "rtn", "scheme": "W6A6"}],
    "W6A6 with all beside, W4A16": [
        {"method": "gptq", "scheme": "W6A6", "outlier_ratio": 0.02, "low_rank": 4, "ignore": ["re:.*down_proj"]},
        {"method": "gptq", "scheme": "W4A16_ASYM", "targets": "re:.*down_proj", "low_rank": 8},
    ],
    "W6A6, rotated": [
        {"method": "rotate"},
        {"method": "rtn", "scheme": "W6A6", "ignore": ["lm_head", "re:.*down_proj"]},
        {"method": "rtn", "scheme": "W6A6", "targets": "re:.*down_proj", "rotate_inputs": True},
    ],
}


@pytest.mark.parametrize("stages", NATIVE.values(), ids=NATIVE)
def test_native_artifacts_serve_exactly_through_our_plugin(tmp_path: Path, stages: list[dict[str, Any]]) -> None:
    """As above; the plugin has our own products, but vLLM fuses linears, and everything between them is its own."""
    folder = compressed(tmp_path, *stages)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "laconic"
    served = serve(folder, prompts(5, 32), "float32")
    ours, original = (laconic.load(m, dtype=torch.float32) for m in (folder, DEMO))
    near, far = (
        torch.stack([(our_logprobs(model, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)])
        for model in (ours, original)
    )
    assert near.median() < 1e-4
    assert (near < 1e-3).float().mean() > 0.6
    assert near.mean() < far.mean() / 5


@FOUR_BITS
@EIGHT_BITS
def test_native_artifacts_serve_by_the_kernels_of_vllm(tmp_path: Path) -> None:
    """In 16 bit the codes are vLLM's, and the side tensors beside them ours."""
    folder = compressed(
        tmp_path,
        {"method": "gptq", "scheme": "W4A16", "outlier_ratio": 0.02, "low_rank": 4, "ignore": ["re:.*down_proj"]},
        {"method": "llm_int8", "threshold": 3.0, "targets": "re:.*down_proj"},
    )
    served = serve(folder, prompts(96, 2), "bfloat16")
    ours = laconic.load(folder, dtype=torch.bfloat16)
    near = [(our_logprobs(ours, i) - p).abs().mean() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    assert sum(near) / len(near) < 0.05


@BLOCKS_OF_FP8
def test_fp8_blocks_serve(tmp_path: Path) -> None:
    """vLLM's CPU kernel leaves the activations in bf16."""
    folder = compressed(tmp_path, {"method": "rtn", "scheme": "FP8_BLOCK"})
    served = serve(folder, prompts(96, 2), "bfloat16")
    ours = laconic.load(folder, dtype=torch.bfloat16)
    near = [(our_logprobs(ours, i) - p).abs().mean() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    assert sum(near) / len(near) < 0.12


# --- other families, tiny and random ---

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 128},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {"ffn_hidden_size": 512},
    "falcon_40b": {"ffn_hidden_size": 512},
}
W8A8 = {"scheme": "W8A8"}
W4A16 = {"scheme": "W4A16", "group_size": 32}
NO_EXPERTS = W4A16 | {"ignore": "re:.*experts.*"}


def family(tmp_path: Path, arch: str, stage: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny model of a family, and what a stage makes of it."""
    heads = {"head_dim": 32} if arch in MIXTURES else {}
    sizes = {"hidden_size": 128, "max_position_embeddings": 512, **FAMILIES.get(arch, {}), **heads}
    model = make_model(tmp_path / "model", arch, tied=arch in ("opt", "gpt2", "falcon"), **sizes)
    return model, laconic.compress(str(model), {"stages": [{"method": "rtn", **stage}]}, tmp_path / "artifact").path


def some_tokens(length: int, count: int) -> list[list[int]]:
    ids = torch.randint(3, 100, (count, length - 1), generator=torch.Generator().manual_seed(0))
    return [[0, *row] for row in ids.tolist()]


@FOUR_BITS
@pytest.mark.parametrize(
    ("arch", "stage"),
    [
        *((arch, W4A16) for arch in FAMILIES),
        *((arch, NO_EXPERTS) for arch in MIXTURES),
        *(pytest.param(arch, W4A16, marks=EXPERTS) for arch in MIXTURES),
    ],
    ids=lambda v: v if isinstance(v, str) else "attention" if "ignore" in v else "",
)
def test_families_serve_with_our_log_probabilities(tmp_path: Path, arch: str, stage: dict[str, Any]) -> None:
    model, folder = family(tmp_path, arch, stage)
    served = serve(folder, some_tokens(48, 3), "bfloat16")
    ours, original = (laconic.load(m, dtype=torch.bfloat16) for m in (folder, model))
    near, far = (
        torch.stack(
            [(our_logprobs(m, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)]
        ).mean()
        for m in (ours, original)
    )
    assert near < 0.05
    assert near < far / 4


@EIGHT_BITS
@pytest.mark.parametrize("arch", [*FAMILIES, *(pytest.param(arch, marks=EXPERTS) for arch in MIXTURES)])
def test_families_serve_exactly_with_rounded_activations(tmp_path: Path, arch: str) -> None:
    _, folder = family(tmp_path, arch, W8A8)
    served = serve(folder, some_tokens(5, 32), "float32")
    ours = laconic.load(folder, dtype=torch.float32)
    differences = torch.stack(
        [(our_logprobs(ours, i) - p).abs() for i, p in zip(served.prompts, served.logprobs, strict=True)]
    )
    assert differences.median() < 1e-4
    assert (differences < 1e-3).float().mean() > 0.6
    assert differences.mean() < 0.05


@pytest.mark.parametrize(("arch", "stage"), [("mixtral", W4A16), ("qwen3_moe", W8A8)], ids=MIXTURES)
def test_vllm_reads_every_expert_as_it_is_stored(tmp_path: Path, arch: str, stage: dict[str, Any]) -> None:
    """What its fused layers hold after loading, before a kernel, which not every processor has, changes the layout."""
    _, folder = family(tmp_path, arch, stage)
    found = tmp_path / "found.pt"
    command = [PYTHON, str(Path(__file__).with_name("load_experts.py")), str(folder), str(found)]
    # It may fail afterwards, for want of the kernels.
    subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, timeout=900, check=False)
    held = tensors(folder)
    layer, (gate, up, down) = (
        ("block_sparse_moe", ("w1", "w3", "w2"))
        if arch == "mixtral"
        else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    for i, loaded in enumerate(torch.load(found)[:2]):
        for leaf in ("weight_packed", "weight_scale") if stage is W4A16 else ("weight", "weight_scale"):
            for e in range(4):
                expert = f"model.layers.{i}.{layer}.experts.{e}"
                both = torch.cat([held[f"{expert}.{n}.{leaf}"] for n in (gate, up)])
                assert torch.equal(loaded[f"w13_{leaf}"][e].to(both.dtype), both)
                assert torch.equal(loaded[f"w2_{leaf}"][e].to(both.dtype), held[f"{expert}.{down}.{leaf}"])
