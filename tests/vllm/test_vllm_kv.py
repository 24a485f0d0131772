"""Real vLLM with our pages: what it says is what a cache of ours says in transformers, one token at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from server import ENVIRONMENT, PYTHON, job, needs_vllm, run
from test_vllm import DEMO, our_logprobs, prompts
from torch import Tensor

import laconic
from laconic.kv.attach import make_cache
from laconic.kv.format import KvFormat
from laconic.kv.scheme import HeadGroup, KvScheme, uniform
from laconic.kv.shape import kv_shape
from rotations import static_rotations

pytestmark = needs_vllm

LAYERS, HEADS = 5, 2
Calibrated = list[dict[str, dict[str, Tensor]]]
FIXED = KvFormat(4, axis="channel", group_size=None)
FP8 = KvFormat(8, datatype="float", symmetric=True, group_size=64)
GROUPS = KvFormat(2, axis="channel", group_size=32)
TABLE = KvFormat(3, axis="channel", group_size=None, datatype="table")


def token(bits: int, **rest: Any) -> KvFormat:
    return KvFormat(bits, group_size=32, **rest)


def one(keys: KvFormat, values: KvFormat | None = None, **rest: Any) -> KvScheme:
    return uniform("test", keys, values or keys, LAYERS, **rest)


def by_head(first: KvFormat, second: KvFormat) -> tuple[HeadGroup, ...]:
    return HeadGroup(first, second, (1,)), HeadGroup(second, token(2), (0,))


SCHEMES: dict[str, tuple[KvScheme, dict[str, Any]]] = {
    "16 bits": (one(KvFormat(16)), {}),
    "8 bits": (one(token(8)), {}),
    "4 bits": (one(token(4)), {}),
    "3 bits": (one(token(3)), {}),
    "2 bits": (one(token(2)), {}),
    "FP8": (one(FP8), {}),
    "FP8, fixed": (one(replace(FP8, group_size=None)), {}),
    "4 bits, outliers": (one(token(4, outlier_ratio=0.05)), {}),
    "keys by channel, fixed": (one(FIXED, token(4)), {}),
    "3-bit table": (one(TABLE, token(3)), {}),
    "before rotary": (one(replace(FIXED, num_bits=3), token(2), pre_rope=True), {}),
    "outliers before rotary": (one(replace(TABLE, outlier_ratio=0.05), token(2), pre_rope=True), {}),
    "hadamard": (one(token(2), rotation="hadamard"), {}),
    "attention's rotation": (one(token(2), rotation="attention"), {}),
    "hadamard before rotary": (one(FIXED, token(3), rotation="hadamard", pre_rope=True), {}),
    "layers and heads apart": (KvScheme("test", (*one(token(8)).layers[:3], *(by_head(FIXED, token(8)),) * 2)), {}),
    "keys by channel": (one(GROUPS, token(2)), {}),
    "keys by channel before rotary": (one(GROUPS, token(2), pre_rope=True), {}),
    "first tokens exact": (one(token(2), sinks=4), {}),
    "keys by channel, first tokens exact": (one(GROUPS, token(2), sinks=4, rotation="hadamard"), {}),
    "recent tokens exact": (one(token(2), residual_length=20, sinks=2), {}),
    "keys by channel, recent tokens exact": (one(GROUPS, token(2), residual_length=16), {}),
    "llama3's rotary": (
        one(token(4), pre_rope=True),
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "a sliding window": (
        one(token(4)),
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An artifact, and what of it is asked of vLLM."""

    folder: Path
    scheme: KvScheme | None
    calibrated: Calibrated | None = None

    @cached_property
    def model(self) -> Any:
        return laconic.load(self.folder, dtype=torch.float32)


def artifact(folder: Path, scheme: KvScheme | None, changes: dict[str, Any] | None = None) -> Case:
    """The demo model with this scheme in its config, and ranges from what it makes of a text."""
    shutil.copytree(DEMO, folder)
    config = json.loads((DEMO / "config.json").read_text()) | (changes or {})
    (folder / "config.json").write_text(json.dumps(config))
    calibrated = None
    if scheme is not None:
        config["laconic_kv_cache"] = scheme.to_dict()
    if scheme is not None and scheme.calibrated:
        calibrated = observe(folder, scheme)
        tensors = {
            f"{i}.{part}.{name}": t.contiguous()
            for i, layer in enumerate(calibrated)
            for part, fixed in layer.items()
            for name, t in fixed.items()
        }
        save_file(tensors, folder / "kv_cache.safetensors")
        with safe_open(folder / "model.safetensors", "pt") as weights:
            named = dict.fromkeys(weights.keys(), "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    (folder / "config.json").write_text(json.dumps(config))
    return Case(folder, scheme, calibrated)


def observe(folder: Path, scheme: KvScheme) -> Calibrated:
    model = laconic.load(folder, dtype=torch.float32)
    exact = one(KvFormat(16), rotation=scheme.rotation, pre_rope=scheme.pre_rope)
    shape = kv_shape(model.config)
    turned = static_rotations(shape.layers, shape.heads, shape.channels) if scheme.rotation == "attention" else None
    cache = make_cache(model, exact, turned)
    with torch.no_grad():
        model(torch.tensor(prompts(256, 1)), past_key_values=cache)
    found: Calibrated = []
    for layer, groups in zip(cache.quantized_layers, scheme.layers, strict=True):
        keys, values = (stored["plain"][0] for stored in layer.stored[0])
        found.append(dict(turned[layer.number]) if turned else {})
        for g, group in enumerate(groups):
            heads = list(group.heads or range(HEADS))
            for of, fmt, x in (("keys", group.keys, keys[heads]), ("values", group.values, values[heads])):
                if fmt.calibrated:
                    found[-1][f"{of}.{g}"] = ranges(fmt, x)
    return found


def ranges(fmt: KvFormat, x: Tensor) -> dict[str, Tensor]:
    """x: (heads, tokens, channels)."""
    lo, hi = x.amin(1), x.amax(1)
    if fmt.datatype == "float":
        return {"scale": torch.maximum(-lo, hi).amax(-1, keepdim=True) / 448}
    if fmt.datatype == "table":
        levels = torch.linspace(-1, 1, 2**fmt.num_bits).sign() * torch.linspace(-1, 1, 2**fmt.num_bits).abs() ** 1.5
        return {"scale": (hi - lo) / 2, "offset": (hi + lo) / 2, "levels": levels}
    return {"scale": (hi - lo) / (2**fmt.num_bits - 1), "offset": lo}


def one_by_one(case: Case, ids: list[int]) -> Tensor:
    """Log-probabilities of all tokens but the first, by transformers with our cache."""
    assert case.scheme is not None
    cache = make_cache(case.model, case.scheme, case.calibrated)
    found = []
    with torch.no_grad():
        for now, following in pairwise(ids):
            out = case.model(torch.tensor([[now]]), past_key_values=cache)
            found.append(out.logits[0, -1].log_softmax(-1)[following])
    return torch.stack(found)


ASKED = prompts(56, 2) + prompts(24, 1)
PLAIN = "no cache of ours"
REFUSED: dict[str, KvScheme] = {
    "--block-size 2048": one(token(4), residual_length=128),
    "--block-size 144": one(replace(GROUPS, group_size=48), token(4)),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, dict[str, Any]]]:
    """Every scheme, one after another in one process: what one model has must be nothing to the next."""
    home = tmp_path_factory.mktemp("kv")
    cases = {name: artifact(home / str(i), *made) for i, (name, made) in enumerate(SCHEMES.items())}
    cases[PLAIN] = artifact(home / "plain", None)
    cases |= {name: artifact(home / f"refused{i}", scheme) for i, (name, scheme) in enumerate(REFUSED.items())}
    jobs = [job(case.folder, [ASKED]) for case in cases.values()]
    windowless = cases["--block-size 2048"]
    cases["window: false"] = replace(windowless, scheme=one(token(4)))
    jobs.append(job(windowless.folder, [ASKED], additional_config={"laconic_kv": {"window": False}}))
    return dict(zip(cases, zip(cases.values(), run(*jobs), strict=True), strict=True))


@pytest.mark.parametrize("name", [*SCHEMES, "window: false"])
def test_log_probabilities_are_those_of_our_own_cache(
    served: dict[str, tuple[Case, dict[str, Any]]], name: str
) -> None:
    """In float32. A number on the edge between two codes may fall either way, and all that follows it with it; so most,
    not all, must agree to the last digits."""
    case, found = served[name]
    assert "error" not in found, found["error"]
    assert found["backend"] == "laconic.serving.vllm_kv"
    near, far = [], []
    for ids, said in zip(ASKED, found["rounds"][0], strict=True):
        whole = [*ids, *said["tokens"]]
        theirs = torch.tensor([*said["prompt_logprobs"], *said["logprobs"]])
        near.append((one_by_one(case, whole) - theirs).abs())
        far.append((our_logprobs(case.model, whole) - theirs).abs())
    differences, damage = torch.cat(near), torch.cat(far)
    print(f"{name}: median {differences.median():.1e}, mean {differences.mean():.1e}, largest {differences.max():.1e}; "
          f"to an exact cache {damage.mean():.1e}; {found['tokens_that_fit']} tokens fit")  # fmt: skip
    assert differences.median() < 1e-4
    assert name == "16 bits" or differences.mean() < damage.mean() / 10


def test_other_models_keep_vllms_own_backend(served: dict[str, tuple[Case, dict[str, Any]]]) -> None:
    case, found = served[PLAIN]
    assert found["backend"] == "vllm.v1.attention.backends.cpu_attn"
    for ids, said in zip(ASKED, found["rounds"][0], strict=True):
        ours = our_logprobs(case.model, ids)
        torch.testing.assert_close(torch.tensor(said["prompt_logprobs"]), ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("change", REFUSED)
def test_what_pages_cannot_hold_is_refused_with_what_to_change(
    served: dict[str, tuple[Case, dict[str, Any]]], change: str
) -> None:
    _, found = served[change]
    assert change in found["error"]


def test_a_packed_cache_gets_our_backend_or_is_refused(tmp_path: Path) -> None:
    """Also after a model without one: vLLM remembers its choice, whichever model it was for."""
    packed, plain = artifact(tmp_path / "packed", one(token(4))), artifact(tmp_path / "plain", None)
    found = tmp_path / "found.json"
    script = Path(__file__).with_name("choose_backend.py")
    command = [PYTHON, str(script), str(packed.folder), str(plain.folder), str(found)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, ours, last = json.loads(found.read_text()).values()
    theirs = ["CPUAttentionBackendImpl", "CPUAttentionBackendImpl"]
    assert first == last == {"chosen": ["theirs"] * 3, "built": theirs}
    assert ours["chosen"][:2] == ["PackedBackend"] * 2
    assert ours["built"][0] == "PackedImpl"
    for refused in (ours["chosen"][2], ours["built"][1]):
        assert "leave out --attention-backend" in refused


def test_two_bits_fit_five_times_the_tokens(tmp_path: Path) -> None:
    shape = kv_shape(artifact(tmp_path / "plain", None).model.config)
    two = artifact(tmp_path / "two", one(token(2)))
    jobs = [job(f, [[[0, 5]]], {"max_tokens": 1}, dtype="bfloat16") for f in (tmp_path / "plain", two.folder)]
    plain, packed = (found["tokens_that_fit"] for found in run(*jobs))
    print(f"tokens in 1 GiB: {plain} in bf16, {packed} in 2 bits: {packed / plain:.2f} times")
    assert plain == pytest.approx(2**30 / (shape.layers * shape.heads * shape.channels * 4), rel=0.01)
    assert packed >= 5 * plain


PAGES = {
    "by token": one(token(4), pre_rope=True),
    "by channel": one(GROUPS, token(4), sinks=4, residual_length=8, pre_rope=True),
}


@pytest.mark.parametrize("scheme", PAGES.values(), ids=PAGES)
def test_prefix_caching_changes_nothing(tmp_path: Path, scheme: KvScheme) -> None:
    """Asked twice, and before that with another end, of which the beginning is found too."""
    case = artifact(tmp_path / "a", scheme)
    (asked,) = prompts(300, 1)
    rounds = [[asked], [asked], [[*asked[:200], *asked[100:180]]], [asked]]
    sampling = {"max_tokens": 40, "logprobs": 1}
    found = run(job(case.folder, rounds, sampling, enable_prefix_caching=True))[0]
    first, again, other, last = (r[0] for r in found["rounds"])
    assert [r["cached"] for r in (first, again, other, last)] == [0, 256, 128, 256]
    for said in (again, last):
        assert said["tokens"] == first["tokens"]
        torch.testing.assert_close(torch.tensor(said["logprobs"]), torch.tensor(first["logprobs"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheme", PAGES.values(), ids=PAGES)
def test_preempted_requests_go_on_as_if_nothing_had_been(tmp_path: Path, scheme: KvScheme) -> None:
    """Six requests that grow to three pages each, where seven pages are. A request that was put off reads its own
    beginning anew, in one step; that changes sums in their last digits, and with bad luck one code."""
    case = artifact(tmp_path / "a", scheme)
    sampling = {"max_tokens": 180, "logprobs": 1}
    asked = prompts(100, 6)
    jobs = [job(case.folder, [asked], sampling), job(case.folder, [asked], sampling, num_gpu_blocks_override=8)]
    roomy, tight = run(*jobs)
    assert (roomy["preempted"], tight["preempted"] > 0, tight["leaked"]) == (0, True, 0)
    same = []
    for a, b in zip(roomy["rounds"][0], tight["rounds"][0], strict=True):
        assert len(b["tokens"]) == 180
        until = next(
            (i for i, pair in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if len(set(pair)) > 1), 180
        )
        same.append(until)
        near = (torch.tensor(a["logprobs"][:until]) - torch.tensor(b["logprobs"][:until])).abs()
        assert near.median() < 1e-4
    print(f"{tight['preempted']} preempted; the same tokens: {same}")
    assert sum(same) > 0.8 * 6 * 180


@pytest.mark.slow
@pytest.mark.parametrize("scheme", PAGES.values(), ids=PAGES)
def test_two_thousand_requests_leave_nothing_behind(tmp_path: Path, scheme: KvScheme) -> None:
    case = artifact(tmp_path / "a", scheme)
    asked = [ids[: 8 + i % 17] for i, ids in enumerate(prompts(32, 40) * 5)]
    short = {"max_tokens": 4, "logprobs": 0}
    found = run(job(case.folder, [asked], short, times=10, max_num_seqs=64), alone=True)[0]
    # What a busy machine takes back and gives again is not what requests leave: the least of several rounds.
    settled, last = min(found["memory"][2:5]), min(found["memory"][-3:])
    print(f"{len(asked) * 10} requests; resident memory from {settled / 2**20:.1f} to {last / 2**20:.1f} MiB")
    assert found["leaked"] == 0
    assert last - settled < 8 * 2**20
