"""A recipe is read, varied and checked; whatever is wrong with it is told in one line that names the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from laconic.methods.gptq import Gptq
from laconic.recipe import Recipe, gallery, load_recipe

STAGE = {"method": "gptq", "scheme": "W4A16"}

KNOWN = (
    "autoround, awq, depth, gptq, kivi, kv_fp8, kv_int8, kv_per_token, kvquant, llm_int8, llm_pruner, lora, magnitude, "
    "qlora, reap, rotate, rtn, smoothquant, sparsegpt, wanda, zeroquant"
)


def a_recipe(**keys: Any) -> dict[str, Any]:
    return {"stages": [STAGE | keys]}


def complaint(recipe: Any, *overrides: str) -> str | None:
    """What is said of a wrong recipe; nothing of a valid one."""
    try:
        load_recipe(recipe, list(overrides))
    except ValueError as e:
        return str(e)
    return None


@pytest.mark.parametrize("name", gallery())
def test_every_ready_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).stages


def test_a_file_a_mapping_and_a_recipe_are_read_alike(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(a_recipe(group_size=32)))
    from_file = load_recipe(file)
    assert from_file == load_recipe(a_recipe(group_size=32)) == load_recipe(from_file)


def test_a_recipe_made_in_python_can_be_varied() -> None:
    made = Recipe(stages=(Gptq(scheme="W4A16", actorder=None),))
    varied = load_recipe(made, ["stages.0.group_size=64"])
    assert (varied.stages[0].group_size, varied.stages[0].actorder) == (64, None)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stages.0.group_size=32", lambda r: r.stages[0].group_size == 32),
        ("stages.0.dampening_frac=1e-3", lambda r: r.stages[0].dampening_frac == 0.001),
        ("stages.0.actorder=null", lambda r: r.stages[0].actorder is None),
        ("stages.0.ignore=[lm_head, 're:.*down_proj']", lambda r: r.stages[0].ignore == ("lm_head", "re:.*down_proj")),
        ("stages.0.targets=re:.*q_proj", lambda r: r.stages[0].targets == ("re:.*q_proj",)),
        ("stages.0={method: rtn, scheme: W8A8}", lambda r: r.stages[0].method == "rtn"),
        ("calibration.dataset=text=1.txt", lambda r: r.calibration.dataset == "text=1.txt"),
        ("output=somewhere", lambda r: r.output == "somewhere"),
    ],
)
def test_set_varies_one_key(override: str, value: Any) -> None:
    assert value(load_recipe(a_recipe(), [override]))


def test_set_fills_a_key_that_was_left_empty() -> None:
    assert load_recipe(a_recipe() | {"calibration": None}, ["calibration.dataset=a.txt"]).calibration


def test_set_leaves_the_callers_mapping_alone() -> None:
    given_ = a_recipe()
    before = copy.deepcopy(given_)
    load_recipe(given_, ["stages.0.group_size=32", "calibration.dataset=a.txt"])
    assert given_ == before


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (a_recipe(methd=1), "unknown key 'stages.0.methd'; did you mean 'method'?"),
        (a_recipe(groupsize=32), "unknown key 'stages.0.groupsize'; did you mean 'group_size'?"),
        (a_recipe() | {"calibartion": {}}, "unknown key 'calibartion'; did you mean 'calibration'?"),
        (
            a_recipe() | {"calibration": {"dataset": "a.txt", "samples": 1}},
            "unknown key 'calibration.samples'; known are ",
        ),
        (a_recipe(method="gpqt"), "unknown method 'gpqt' in stages.0; did you mean 'gptq'?"),
        (a_recipe(method="gqtp"), "unknown method 'gqtp' in stages.0; did you mean 'gptq'?"),
        (None, "None is no recipe; give a name of the gallery, a YAML file, or a dict of its keys"),
        (3, "3 is no recipe; give a name of the gallery, a YAML file, or a dict of its keys"),
        (
            a_recipe(method=3),
            f"stages.0.method should be the name of a method, one of {KNOWN}",
        ),
        (a_recipe(scheme="W4A17"), "stages.0.scheme: unknown scheme 'W4A17': did you mean 'W4A16'?"),
        (a_recipe(scheme="w8a8"), "stages.0.scheme: unknown scheme 'w8a8': did you mean 'W8A8'?"),
        (a_recipe(dampening_frac=3), "stages.0.dampening_frac should be less than or equal to 1, not 3"),
        (a_recipe(dampening_frac=float("nan")), "stages.0.dampening_frac should be less than or equal to 1, not .nan"),
        (a_recipe(group_size="many"), "stages.0.group_size: should be a valid integer, or 'auto', not many"),
        (a_recipe(group_size=0), "stages.0: group_size must be at least 1 (or -1 for one per channel), not 0"),
        (a_recipe(strategy="row"), "stages.0.strategy should be 'tensor', 'channel' or 'group', not row"),
        (a_recipe(dynamic=True), "stages.0: W4A16 keeps activations in 16 bit: leave 'dynamic' out"),
        (a_recipe(targets=[]), "stages.0.targets should have at least one item"),
        (a_recipe(targets=[3]), "stages.0.targets.0 should be a valid string, not 3"),
        (a_recipe(targets="re:["), "stages.0.targets: 're:[' is not a regular expression: "),
        (
            {"stages": [{"scheme": "W4A16"}]},
            f"stages.0 names no method: add 'method: NAME', one of {KNOWN}",
        ),
        ({"stages": [{"method": "gptq"}]}, "the recipe lacks 'stages.0.scheme'"),
        ({"stages": ["gptq"]}, "stages.0 should hold keys and values"),
        ({"stages": STAGE}, "stages should be a list"),
        ({"stages": []}, "stages should have at least one item"),
        ({"model": "m"}, "the recipe lacks 'stages'"),
        (a_recipe(group_size=True), "stages.0.group_size should be a number, not true"),
        (a_recipe() | {"seed": True}, "seed should be a number, not true"),
        (a_recipe() | {"seed": -1}, "seed should be greater than or equal to 0, not -1"),
        (a_recipe() | {"seed": 2**64}, "seed should be less than "),
        (a_recipe() | {"device": "tpu"}, "device should be 'auto', 'cpu' or 'cuda', not tpu"),
        (a_recipe() | {1: 2}, "1: a key should be a word"),
        (
            {"stages": [{}, {}]},
            f"stages.0 names no method: add 'method: NAME', one of {KNOWN} (and 1 more)",
        ),
        (
            {"stages": [{"method": "kivi"}, STAGE]},
            "stages: a recipe has one stage for the cache, and it comes last, since it observes the compressed model; "
            "these are kivi, gptq",
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_fix(recipe: Any, expected: str) -> None:
    assert complaint(recipe).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.0.group_size", "--set stages.0.group_size: write it as key.path=value, for instance "),
        ("=32", "--set =32: write it as key.path=value, for instance "),
        ("stages.1.group_size=32", "--set stages.1.group_size: '1' is no position in a list of 1 (they count from 0)"),
        ("stages.first.group_size=32", "--set stages.first.group_size: 'first' is no position in a list of 1 "),
        ("stages.²=1", "--set stages.²: '²' is no position in a list of 1 "),
        ("stages.0.scheme.x=1", "--set stages.0.scheme.x: 'scheme' holds a plain value, not keys"),
        ("seed=[1", "--set seed: '[1' is not a YAML value in line 1: "),
        ("seed=2020-99-99", "--set seed: '2020-99-99' is not a YAML value: month must be in 1..12"),
        ("seed=!!timestamp x", "--set seed: '!!timestamp x' is not a YAML value: a tag does not fit its value"),
        ("seed=" + "[" * 9999, "--set seed: '[[[[[[[["),
        ("stages.0.group=32", "unknown key 'stages.0.group'; did you mean 'group_size'?"),
    ],
)
def test_a_wrong_set_is_named_with_its_fix(override: str, expected: str) -> None:
    said = complaint(a_recipe(), override)
    assert said.startswith(expected)
    assert len(said) < 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", " is not a recipe: it needs a list of 'stages'"),
        (b"- method: gptq\n", " is not a recipe: it needs a list of 'stages'"),
        (b"gptq", " is not a recipe: it needs a list of 'stages'"),
        (b"stages: [\n", " is not valid YAML in line 2: "),
        (b"stages:\n\t- method: gptq", " is not valid YAML in line 2: "),
        (b"\x89PNG\r\n\x1a\n\x00", " is not valid YAML: it holds a character that YAML does not allow"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert complaint(file).startswith(f"{file}{expected}")


def test_a_file_with_a_wrong_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for recipe in (a_recipe(groupsize=32), {"recipe": a_recipe(groupsize=32)}):
        file.write_text(yaml.safe_dump(recipe))
        assert complaint(file) == f"{file}: unknown key 'stages.0.groupsize'; did you mean 'group_size'?"


def test_only_the_recipe_of_an_artifact_may_have_the_old_name_of_a_key(tmp_path: Path) -> None:
    file, recipe = tmp_path / "recipe.yaml", a_recipe(asymmetric=0.5)
    file.write_text(yaml.safe_dump({"recipe": recipe, "source": {}}))
    assert load_recipe(file) == load_recipe(a_recipe(asymmetric_calibration=0.5))
    assert complaint(recipe) == "stages.0: 'asymmetric' is now called 'asymmetric_calibration'; rename the key"


def test_a_missing_file_and_an_unknown_name_get_a_hint() -> None:
    assert complaint("gone.yaml").startswith("no recipe file 'gone.yaml'; check the path, or name one of: ")
    assert complaint("gptq-w4a61") == "no recipe 'gptq-w4a61'; did you mean 'gptq-w4a16'?"
    assert complaint("???").startswith("no recipe '???'; the gallery has ")


keys = st.sampled_from(
    ["stages", "0", "1", "method", "scheme", "group_size", "calibration", "dataset", "seed", "", "x"]
)
values = st.text(max_size=20) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
).map(yaml.safe_dump)


@given(st.lists(keys, max_size=4).map(".".join), values)
def test_whatever_is_set_the_recipe_is_valid_or_told_why_not(key: str, value: str) -> None:
    assert is_plain(complaint(a_recipe(), f"{key}={value}"))


@given(
    st.binary(max_size=200) | st.text(alphabet="stages: methodgpq-[]{}&*!?|>%@`\n\t'\"#", max_size=80).map(str.encode)
)
def test_whatever_a_file_holds_it_is_valid_or_told_why_not(tmp_path_factory: Any, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "whatever.yaml"
    file.write_bytes(content)
    assert is_plain(complaint(file))


def is_plain(said: str | None) -> bool:
    return said is None or (said != "" and not any(w in said for w in ("pydantic", "object at 0x", "NoneType")))
