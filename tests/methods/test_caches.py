"""What every method that stores the cache promises: from recipe to artifact to `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
from artifacts import Stage, original, press, same_bytes, tensors, tokens
from commands import Laconic
from laconic.artifact.size import measure_size
from laconic.checkpoint.files import KV_CACHE, KV_CONFIG
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text
from laconic.kv.attach import make_cache
from laconic.kv.files import read_kv_scheme
from laconic.kv.format import decode_kv, encode_kv
from laconic.methods import METHODS
from laconic.stages.cache import CacheStage
from tiny import make_model

NAMES = [m.model_fields["method"].default for m in METHODS if issubclass(m, CacheStage)]
STAGES: list[Stage] = [
    *({"method": name} for name in NAMES if name != "kvquant"),
    {"method": "kvquant", "group_size": 16},
    {"method": "kivi", "key_ranges": "static", "residual_length": 0},
    {"method": "kivi", "group_size": 4, "residual_length": 4, "sinks": 1, "rotation": "hadamard"},
    {"method": "kivi", "group_size": 4, "residual_length": 4, "rotation": "attention"},
    {"method": "kvquant", "group_size": 8, "rotation": "attention"},
    {"method": "kivi", "group_size": 4, "residual_length": 0, "budget_bits": 3},
    {"method": "kivi", "group_size": 4, "residual_length": 0, "budget_bits": 3.5, "per_head": True},
    {"method": "kvquant", "key_ranges": "static"},
    {"method": "kvquant", "group_size": 4, "budget_bits": 4, "max_error": 0.5},
    {"method": "kvquant", "group_size": 8, "before_rope": False, "datatype": "int", "outlier_ratio": 0},
]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda s: "-".join(map(str, s.values())))


@every_stage
def test_weights_are_left_alone_and_the_same_seed_gives_the_same_bytes(
    stage: Stage, llama: Path, text: Path, tmp_path: Path
) -> None:
    first, again = (press(llama, tmp_path / str(i), stage, text=text) for i in range(2))
    assert same_bytes(first.path, again.path)
    assert first.config == again.config
    before, after = tensors(llama), tensors(first.path)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not list(first.path.glob("calibration*"))


@every_stage
@torch.no_grad()
def test_a_loaded_artifact_generates_with_its_cache(stage: Stage, llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(llama, tmp_path / "artifact", stage, text=text)
    model = laconic.load(artifact.path, dtype=torch.float32)
    kept = read_kv_scheme(artifact.path, artifact.config)
    assert kept is not None
    made = []
    prepare = vars(model)["_prepare_cache_for_generation"]

    def watched(config: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        result = prepare(config, kwargs, *rest)
        made.append(kwargs.get("cache", kwargs.get("past_key_values")))
        return result

    vars(model)["_prepare_cache_for_generation"] = watched
    found = model.generate(tokens(2, 20), max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert found.shape == (2, 28)
    assert made[0].scheme == kept[0]
    assert made[0].get_seq_length() == 27


@pytest.mark.parametrize("method", ["kv_int8", "kv_fp8"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    method: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"method": "gptq", "scheme": "W4A16", "group_size": 32}, {"method": method}]
    whole = press(llama, tmp_path / "whole", *stages, text=text)
    from laconic.artifact.workspace import Workspace

    write, written = Workspace.write_shard, []

    def die_after_one(self: Workspace, *args: Any) -> None:
        if written:
            raise KeyboardInterrupt
        write(self, *args)
        written.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_shard", die_after_one)
        with pytest.raises(KeyboardInterrupt):
            press(llama, tmp_path / "killed", *stages, text=text)
    resumed = press(llama, tmp_path / "killed", *stages, text=text)
    assert same_bytes(whole.path, resumed.path)
    assert whole.config == resumed.config


def test_bits_go_where_attention_needs_them(llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": "kivi", "group_size": 4, "residual_length": 0, "budget_bits": 3}
    kept = read_kv_scheme((a := press(llama, tmp_path / "a", stage, text=text)).path, a.config)
    assert kept is not None
    bits = [f.num_bits for layer in kept[0].layers for g in layer for f in (g.keys, g.values)]
    assert sum(bits) <= 3 * len(bits)
    assert set(bits) <= {2, 3, 4, 8}


def test_a_layer_whose_attention_is_lost_stays_in_sixteen_bit(llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": "kivi", "k_bits": 1, "v_bits": 1, "max_error": 1e-9}
    kept = read_kv_scheme((a := press(llama, tmp_path / "a", stage, text=text)).path, a.config)
    assert kept is not None
    assert all(f.num_bits == 16 for layer in kept[0].layers for g in layer for f in (g.keys, g.values))


@torch.no_grad()
def test_fixed_ranges_are_those_of_the_models_own_keys(llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(llama, tmp_path / "int8", {"method": "kv_int8"}, text=text)
    kept = read_kv_scheme(artifact.path, artifact.config)
    assert kept is not None
    from artifacts import windows

    model = original(llama)
    seen = model(windows(llama, text), use_cache=True)
    cache = getattr(seen, "cache", None) or seen.past_key_values
    for i, layer in enumerate(cache.layers):
        for which, x in (("keys", layer.keys), ("values", layer.values)):
            scale = float(kept[1][i][f"{which}.0"]["scale"])
            assert scale == pytest.approx(float(x.abs().max()) / 127, rel=0.05)
            fmt, static = getattr(kept[0].layers[i][0], which), kept[1][i][f"{which}.0"]
            back = decode_kv(fmt, encode_kv(fmt, x, static), x.shape[-1], static)
            assert float((back - x).abs().max()) < scale


@pytest.mark.parametrize("weights", [[], [{"method": "rtn", "scheme": "W4A16", "group_size": 32}]])
def test_an_artifact_of_fp8_is_measured_as_any_other(
    weights: list[dict[str, Any]], llama: Path, text: Path, tmp_path: Path
) -> None:
    artifact = press(llama, tmp_path / "fp8", *weights, {"method": "kv_fp8"}, text=text)
    plain = press(llama, tmp_path / "plain", *weights).path if weights else llama
    found, expected = measure_size(artifact.path), measure_size(plain)
    assert (found.parameters, found.schemes, found.covered) == (expected.parameters, expected.schemes, expected.covered)
    assert evaluate_text(artifact.path, TextOptions(text=str(text), context_length=64, windows=2))["perplexity"] > 1
    assert (artifact.path / "README.md").exists()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda file: file.write_bytes(b""), "cannot be read (Error while deserializing header: "),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "cannot be read (Error while deserializing header: "),
        (lambda file: rewrite(file, lambda t: t.pop("1.values.0.levels")), "lacks '1.values.0.levels'; copy it"),
        (lambda file: rewrite(file, lambda t: t.update({"7.keys.0.scale": t["0.keys.0.levels"]})), "cannot be read ("),
        (lambda file: rewrite(file, lambda t: t.update({"scale": t["0.keys.0.levels"]})), "cannot be read ("),
    ],
)
def test_a_damaged_file_of_what_is_fixed_is_told(
    harm: Callable[[Path], None], told: str, laconic: Laconic, llama: Path, text: Path, tmp_path: Path
) -> None:
    artifact = press(llama, tmp_path / "kvquant", {"method": "kvquant"}, text=text, length=64)
    file = artifact.path / KV_CACHE
    harm(file)
    said = laconic("eval", "long", artifact.path, "--measure", "memory", "--lengths", "64").complaint
    assert said.startswith(f"{file} {told}")
    assert said.endswith("or compress again")


def test_a_file_without_a_rotation_that_was_found_is_told(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path
) -> None:
    stage = {"method": "kivi", "group_size": 4, "residual_length": 4, "rotation": "attention"}
    file = press(llama, tmp_path / "turned", stage, text=text).path / KV_CACHE
    rewrite(file, lambda t: t.pop("1.turn.0.values"))
    said = laconic("eval", "long", file.parent, "--measure", "memory", "--lengths", "64").complaint
    assert said.startswith(f"{file} lacks '1.turn.0.values'; copy it")


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    kept = load_file(file)
    change(kept)
    save_file({name: t.clone() for name, t in kept.items()}, file)


def test_fp8_is_told_to_engines_in_their_words(llama: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"method": "rtn", "scheme": "W4A16", "group_size": 32}, {"method": "kv_fp8"}]
    artifact = press(llama, tmp_path / "fp8", *stages, text=text)
    told = artifact.config["quantization_config"]["kv_cache_scheme"]
    assert (told["num_bits"], told["type"], told["strategy"]) == (8, "float", "tensor")
    fixed = tensors(artifact.path)
    for i in range(2):
        for leaf, which in (("k_scale", "keys"), ("v_scale", "values")):
            ours = fixed[f"{i}.{which}.0.scale"].flatten()
            assert torch.equal(fixed[f"model.layers.{i}.self_attn.{leaf}"], ours)


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"method": "kvquant"}], "kvquant needs calibration text"),
        ([{"method": "kivi", "budget_bits": 3}], "kivi needs calibration text"),
        ([{"method": "kivi"}, {"method": "rtn", "scheme": "W8A16"}], "it comes last"),
        ([{"method": "kivi"}, {"method": "kv_per_token"}], "one stage for the cache"),
        ([{"method": "kivi", "group_size": 12}], r"stages\.0 \(kivi\): group_size 12 does not divide the 16 channels"),
        ([{"method": "kivi", "k_bits": 12}], r"stages\.0\.k_bits"),
        ([{"method": "kivi", "per_head": True}], "per_head allocates a budget to heads"),
        ([{"method": "kivi", "targets": "Linear"}], "unknown key 'stages.0.targets'"),
    ],
)
def test_it_is_refused_before_anything_is_written(stages: list[Stage], told: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        press(llama, tmp_path / "x", *stages)
    assert not list(tmp_path.iterdir())


def test_samples_too_short_to_be_stored_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stores 64 tokens together, more than the 32 of a calibration sample"):
        press(llama, tmp_path / "x", {"method": "kvquant"}, text=text)
    assert not list(tmp_path.iterdir())


def test_a_model_without_rotary_embeddings_is_told_what_to_set(text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "opt", "opt")
    with pytest.raises(ValueError, match="before_rope: false"):
        press(folder, tmp_path / "x", {"method": "kvquant", "group_size": 16}, text=text)
    press(folder, tmp_path / "y", {"method": "kvquant", "group_size": 16, "before_rope": False}, text=text)


def test_a_cache_of_another_model_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(llama, tmp_path / "a", {"method": "kvquant", "group_size": 16}, text=text)
    kept = read_kv_scheme(artifact.path, artifact.config)
    assert kept is not None
    other = original(make_model(tmp_path / "other", "llama", seed=5))
    with pytest.raises(ValueError, match="calibrated on another model"):
        make_cache(other, *kept)


def test_a_damaged_artifact_says_what_is_missing(llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = press(llama, tmp_path / "a", {"method": "kvquant", "group_size": 16}, text=text)
    (artifact.path / KV_CACHE).unlink()
    with pytest.raises(ValueError, match=KV_CACHE):
        laconic.load(artifact.path)
    config = artifact.config
    config[KV_CONFIG]["layers"] = [[{"keys": {"bits": 3}}]]
    (artifact.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be read"):
        laconic.load(artifact.path)
