"""The quantization_config: compressed-tensors understands what we write, and we understand what it may say."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laconic.formats import Format
from laconic.formats.fp4 import NvFp4
from laconic.formats.schemes import PRESETS, Scheme, scheme
from laconic.runtime.quant_config import schemes_from_config, to_config

LINEARS = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
VARIED = (
    scheme("W4A16", group_size=32),
    scheme("W8A16", symmetric=False),
    scheme("W3A16", symmetric=False, group_size=-1),
    scheme("W8A8", dynamic=False),
    scheme("W8A8", strategy="tensor"),
    scheme("FP8_DYNAMIC", strategy="tensor"),
    scheme("FP8", strategy="channel"),
    scheme("W6A6", dynamic=False),
    scheme("W6A6", group_size=64),
)
SCHEMES = (*PRESETS.values(), *VARIED)

every_scheme = pytest.mark.parametrize("kept", SCHEMES, ids=lambda s: s.name)


def nameless(schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """A name is for people, and is not written."""
    return {linear: replace(s, name="") for linear, s in schemes.items()}


@every_scheme
def test_reading_gives_back_what_was_written(kept: Scheme) -> None:
    schemes = dict.fromkeys(LINEARS[:-1], kept)
    assert nameless(schemes_from_config(to_config(schemes, LINEARS), LINEARS)) == nameless(schemes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_known_by_its_name_again(preset: str) -> None:
    schemes = {LINEARS[0]: PRESETS[preset]}
    assert schemes_from_config(to_config(schemes, LINEARS), LINEARS) == schemes


@given(mixed=st.dictionaries(st.sampled_from(LINEARS), st.sampled_from(SCHEMES), min_size=1))
@settings(max_examples=60, deadline=None)
def test_reading_gives_back_any_mixture(mixed: dict[str, Scheme]) -> None:
    assert nameless(schemes_from_config(to_config(mixed, LINEARS), LINEARS)) == nameless(mixed)


@given(mixed=st.dictionaries(st.sampled_from(LINEARS), st.sampled_from(SCHEMES), min_size=1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_reading_gives_back_what_is_kept_beside_the_codes(mixed: dict[str, Scheme], data: st.DataObject) -> None:
    few = st.integers(0, 3)
    mixed = {n: replace(s, outlier_columns=data.draw(few), rank=data.draw(few)) for n, s in mixed.items()}
    config = to_config(mixed, LINEARS)
    assert nameless(schemes_from_config(config, LINEARS)) == nameless(mixed)
    beside = any(s.outlier_columns or s.rank for s in mixed.values())
    simulated = any(s.simulated for s in mixed.values())
    assert config["quant_method"] == ("laconic" if beside or simulated else "compressed-tensors")


class Tiny(nn.Module):
    """Linears of the names above."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.ModuleDict(  # noqa: E731
            {
                "self_attn": nn.ModuleDict({"q_proj": nn.Linear(256, 256)}),
                "mlp": nn.ModuleDict({"up_proj": nn.Linear(256, 256)}),
            }
        )
        self.model = nn.ModuleDict({"layers": nn.ModuleList([layer() for _ in range(3)])})
        self.lm_head = nn.Linear(256, 256)


def as_they_apply_it(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What compressed-tensors makes of a config: the number formats that it gives to each linear."""
    with torch.device("meta"):
        model = Tiny()
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    return {
        name: module.quantization_scheme.model_dump(include={"weights", "input_activations", "format"})
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


@given(mixed=st.dictionaries(st.sampled_from(LINEARS), st.sampled_from(SCHEMES), min_size=1))
@settings(max_examples=20, deadline=None)
def test_compressed_tensors_gives_each_linear_the_scheme_that_we_mean(mixed: dict[str, Scheme]) -> None:
    config = to_config(mixed, LINEARS)
    config.pop("dequantize", None)
    found = as_they_apply_it(config)
    assert found.keys() == mixed.keys()
    for name, kept in mixed.items():
        weights, acts = found[name]["weights"], found[name]["input_activations"]
        assert found[name]["format"] == kept.storage
        assert (weights["num_bits"], weights["symmetric"]) == (kept.weights.num_bits, kept.weights.symmetric)
        assert (weights["strategy"], weights["group_size"]) == (
            strategy(kept.weights),
            kept.weights.tiling.group_size,
        )
        assert (acts is None) == (kept.input_activations is None)
        if acts:
            assert (acts["num_bits"], acts["dynamic"], acts["strategy"]) == (
                kept.input_activations.format.num_bits,
                kept.input_activations.dynamic,
                strategy(kept.input_activations.format),
            )


def strategy(fmt: Format) -> str:
    """As they call it."""
    return "tensor_group" if isinstance(fmt, NvFp4) else fmt.tiling.strategy


@pytest.mark.parametrize("preset", ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "W4A16", "W4A16_ASYM", "FP8_BLOCK"])
def test_a_preset_is_written_as_theirs_of_the_same_name(preset: str) -> None:
    ours = to_config({LINEARS[0]: PRESETS[preset]}, LINEARS)["config_groups"]["group_0"]
    theirs = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    for side in ("weights", "input_activations"):
        # How a scale is found is no matter of the file.
        expected = {k: v for k, v in (theirs[side] or {}).items() if k != "observer"}
        assert (ours[side] or {}) == expected


@pytest.mark.parametrize(
    ("preset", "method"),
    [(p, "laconic" if p in ("W7A7", "W6A6", "W4A6", "W4A4") else "compressed-tensors") for p in PRESETS],
)
def test_only_what_no_engine_runs_is_marked_as_ours(preset: str, method: str) -> None:
    assert to_config({LINEARS[0]: PRESETS[preset]}, LINEARS)["quant_method"] == method


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
W8 = W4 | {"num_bits": 8}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
A8 = W8 | {"strategy": "token", "dynamic": True}


def config(*groups: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A config as somebody else may write it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": deepcopy(g) for i, g in enumerate(groups)},
        **rest,
    }


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [
        (["model.layers.0.self_attn.q_proj"], {"model.layers.0.self_attn.q_proj": 8}),
        (["re:.*up_proj"], {n: 8 for n in LINEARS if n.endswith("up_proj")}),
        (["re:model.layers.[01].*", "lm_head"], dict.fromkeys((*LINEARS[:4], "lm_head"), 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("class_first", [True, False])
def test_a_name_or_a_pattern_goes_before_the_class(pattern: list[str], bits: dict[str, int], class_first: bool) -> None:
    groups = [{"targets": ["Linear"], "weights": W4}, {"targets": pattern, "weights": W8}]
    theirs = config(*(groups if class_first else reversed(groups)))
    found = schemes_from_config(theirs, LINEARS)
    assert {n: s.weights.num_bits for n, s in found.items()} == dict.fromkeys(LINEARS, 4) | bits
    assert {n: s["weights"]["num_bits"] for n, s in as_they_apply_it(theirs).items()} == dict.fromkeys(
        LINEARS, 4
    ) | bits


def test_a_name_goes_before_a_pattern() -> None:
    theirs = config(
        {"targets": ["re:.*up_proj"], "weights": W4}, {"targets": ["model.layers.1.mlp.up_proj"], "weights": W8}
    )
    bits = {n: s.weights.num_bits for n, s in schemes_from_config(theirs, LINEARS).items()}
    assert bits == {n: 8 if "layers.1" in n else 4 for n in LINEARS if n.endswith("up_proj")}


@pytest.mark.parametrize("ignore", [["lm_head"], ["re:.*q_proj", "lm_head"], [], None], ids=str)
def test_what_is_ignored_has_no_scheme(ignore: list[str] | None) -> None:
    found = schemes_from_config(config({"targets": ["Linear"], "weights": W4}, ignore=ignore), LINEARS)
    left_out = {n for n in LINEARS if n in (ignore or ()) or (n.endswith("q_proj") and ignore and len(ignore) == 2)}
    assert found.keys() == set(LINEARS) - left_out


@pytest.mark.parametrize(
    "theirs",
    [
        config({"targets": ["Linear"], "weights": W4 | {"type": "float"}}),
        config({"targets": ["Linear"], "weights": W4 | {"actorder": "group"}}),
        config({"targets": ["Linear"], "weights": W4 | {"num_bits": 16}}),
        config({"targets": ["Linear"], "weights": W4 | {"strategy": "tensor_group", "group_size": 16}}),
        config({"targets": ["Linear"], "weights": FP4 | {"group_size": 64}}, format="nvfp4-pack-quantized"),
        config({"targets": ["Linear"], "weights": FP4 | {"strategy": "group"}}, format="mxfp4-pack-quantized"),
        config({"targets": ["Linear"], "weights": FP4 | {"scale_dtype": "torch.uint8"}}, format="nvfp4-pack-quantized"),
        config({"targets": ["Linear"], "weights": W4, "output_activations": A8}),
        config({"targets": ["Linear"], "input_activations": A8}),
        config(
            {
                "targets": ["Linear"],
                "weights": W8,
                "input_activations": W8 | {"strategy": "tensor", "symmetric": False},
            },
            format="int-quantized",
        ),
        config({"targets": ["Linear"], "weights": W4}, format="marlin-24"),
        config({"targets": ["Linear"], "weights": W4}, kv_cache_scheme=W8 | {"strategy": "tensor"}),
        config({"targets": ["Linear"], "weights": W4}, transform_config={"config_groups": {"u": {}}}),
        config({"targets": ["Linear"], "weights": W4}, sparsity_config={"format": "sparse-24-bitmask"}),
    ],
    ids=[
        "float4",
        "g_idx",
        "int16",
        "int4 with a scale of the whole tensor",
        "nvfp4 in groups of 64",
        "mxfp4 in groups of 16",
        "nvfp4 with scales of mxfp4",
        "outputs",
        "inputs alone",
        "zero point",
        "marlin",
        "kv",
        "transform",
        "2:4",
    ],
)
def test_what_we_have_no_format_for_is_refused(theirs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*; .*compress the original model|unknown strategy|2 to 8 bits"):
        schemes_from_config(theirs, LINEARS)
