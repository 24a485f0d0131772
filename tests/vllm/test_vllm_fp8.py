"""Real vLLM with its own FP8 cache, on the scales that `kv_fp8` calibrated."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from server import job, needs_vllm, run
from test_vllm import compressed, our_logprobs, prompts
from test_vllm_kv import Case, one_by_one
from torch import Tensor
from transformers import DynamicCache

import laconic
from artifacts import tensors
from laconic.kv.files import read_kv_scheme
from vllm_kernels import FP8_CACHE

pytestmark = [*needs_vllm, FP8_CACHE]

ASKED = prompts(56, 2) + prompts(24, 1)


def cut(x: Tensor) -> Tensor:
    """x in FP8 E4M3 as vLLM's CPU kernel stores it: towards zero, where ours takes the nearest."""
    x = x.clamp(-448, 448)
    nearest = x.to(torch.float8_e4m3fn)
    beyond = nearest.to(x.dtype).abs() > x.abs()
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn).to(x.dtype)


class CutCache(DynamicCache):
    """Keys and values in FP8 as they come, those of the newest token too, as vLLM's pages have them."""

    def __init__(self, scales: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = [cut(x / s) * s for x, s in zip((keys, values), self.scales[layer], strict=True)]
        return super().update(*stored, layer, *args, **kwargs)


def token_by_token(model: Any, cache: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of all tokens but the first."""
    found = []
    with torch.no_grad():
        for now, following in pairwise(ids):
            out = model(torch.tensor([[now]]), past_key_values=cache)
            found.append(out.logits[0, -1].log_softmax(-1)[following])
    return torch.stack(found)


def test_vllm_opens_a_kv_fp8_artifact_with_its_own_fp8_cache(tmp_path: Path) -> None:
    """vLLM says nothing where it cannot do a type of cache, so log-probabilities are compared, in float32: to the last
    digits with a plain cache on our scales that cuts as its CPU kernel does, and about with ours, which rounds."""
    folder = compressed(tmp_path, {"method": "kv_fp8"})
    model = laconic.load(folder, dtype=torch.float32)
    held = tensors(folder)
    names = [f"model.layers.{i}.self_attn." for i in range(model.config.num_hidden_layers)]
    scales = [(held[n + "k_scale"].float(), held[n + "v_scale"].float()) for n in names]

    (found,) = run(job(folder, [ASKED]))

    assert "error" not in found, found["error"]
    assert found["backend"] == "vllm.v1.attention.backends.cpu_attn"
    assert (found["cache_dtype"], found["bytes"]) == ("fp8", 1)
    assert found["scales"] == [[pytest.approx(float(s)) for s in pair] for pair in scales]
    kept = read_kv_scheme(folder, json.loads((folder / "config.json").read_text()))
    assert kept is not None
    ours = Case(folder, *kept)
    to_cut, to_ours, to_exact = [], [], []
    for ids, said in zip(ASKED, found["rounds"][0], strict=True):
        whole = [*ids, *said["tokens"]]
        theirs = torch.tensor([*said["prompt_logprobs"], *said["logprobs"]])
        to_cut.append((token_by_token(model, CutCache(scales), whole) - theirs).abs())
        to_ours.append((one_by_one(ours, whole) - theirs).abs())
        to_exact.append((our_logprobs(model, whole) - theirs).abs())
    same, near, far = (torch.cat(d) for d in (to_cut, to_ours, to_exact))
    for name, d in (("the same cutting", same), ("our cache", near), ("an exact cache", far)):
        print(f"to {name}: median {d.median():.1e}, mean {d.mean():.1e}, largest {d.max():.1e}")
    # A number on the edge of two codes may fall either way, and what follows with it; so most, not all, must agree.
    assert same.median() < 1e-4
    assert same.mean() < far.mean() / 10
    assert near.mean() < 0.2
