"""What a study asks for, against a plain product; what is wrong with one, in a line."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from commands import Laconic
from laconic.recipe import gallery, load_recipe
from laconic.sweep.runner import dry_run
from laconic.sweep.runs import plan_runs
from laconic.sweep.study import load_study, points
from tiny import make_text

Stages = list[dict[str, Any]]
RTN = {"method": "rtn", "scheme": "W4A16", "group_size": 32}
EVALUATIONS = [{"text": "text.txt"}]
KEYS = ("stages.0.group_size", "stages.0.scheme", "calibration.dataset", "calibration.num_calibration_samples", "model")


def study(**keys: Any) -> dict[str, Any]:
    return {"base": {"stages": [RTN]}, "evaluations": EVALUATIONS} | keys


def axis(key: str, *values: Any, **more: Any) -> dict[str, Any]:
    return {"key": key, "values": list(values), **more}


def chosen(asked: dict[str, Any]) -> list[dict[str, Any]]:
    return [point.values for point in points(load_study(asked))]


plain = st.integers(0, 9) | st.text("abc", max_size=2) | st.booleans()
grids = st.dictionaries(st.sampled_from(KEYS), st.lists(plain, min_size=1, max_size=4), max_size=4)


@given(grids, st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_a_grid_is_the_product_of_its_axes(grid: dict[str, list[Any]], seeds: list[int] | None) -> None:
    asked = study(axes=[axis(k, *v) for k, v in grid.items()])
    all_axes = grid | ({"seed": seeds} if seeds else {})
    if seeds:
        asked["seeds"] = seeds
    expected = [dict(zip(all_axes, values, strict=True)) for values in product(*all_axes.values())]
    assert chosen(asked) == expected


@given(grids, st.integers(1, 20), st.integers(0, 3))
def test_random_points_are_different_points_of_the_grid(grid: dict[str, list[Any]], n: int, seed: int) -> None:
    grid = {k: sorted(set(map(str, v))) for k, v in grid.items()}
    asked = study(axes=[axis(k, *v) for k, v in grid.items()])
    whole = chosen(asked)
    drawn = chosen(asked | {"search": {"kind": "random", "n": n, "seed": seed}})
    assert len(drawn) == min(n, len(whole))
    assert all(point in whole and drawn.count(point) == 1 for point in drawn)
    assert drawn == chosen(asked | {"search": {"kind": "random", "n": n, "seed": seed}})


def test_random_points_do_not_need_the_whole_grid() -> None:
    axes = [axis(f"calibration.{i}", *range(1000)) for i in range(10)]
    several = [chosen(study(axes=axes, search={"kind": "random", "n": 5, "seed": seed})) for seed in (0, 1)]
    assert [len(points) for points in several] == [5, 5]
    assert several[0] != several[1]


def test_an_axis_under_a_condition_applies_only_there() -> None:
    stages: dict[str, Stages] = {"rtn": [RTN], "two": [{"method": "smoothquant"}, RTN], "awq": [{"method": "awq"}]}
    group = axis("stages.0.group_size", 64, 128, when={"stages.0.method": ["rtn", "awq"]})
    alpha = axis("stages.0.alpha", 0.3, 0.5, when={"stages.0.method": "smoothquant", "stages.1.scheme": "W4A16"})
    found = list(points(load_study(study(axes=[{"key": "stages", "values": stages}, group, alpha]))))
    assert [p.values for p in found] == [
        {"stages": "rtn", "stages.0.group_size": 64},
        {"stages": "rtn", "stages.0.group_size": 128},
        {"stages": "two", "stages.0.alpha": 0.3},
        {"stages": "two", "stages.0.alpha": 0.5},
        {"stages": "awq", "stages.0.group_size": 64},
        {"stages": "awq", "stages.0.group_size": 128},
    ]
    assert found[2].recipe["stages"] == [{"method": "smoothquant", "alpha": 0.3}, RTN]
    assert found[0].recipe["stages"] == [RTN | {"group_size": 64}]


def test_a_list_names_its_runs() -> None:
    runs = [{"stages.0.group_size": 64, "device": "cpu"}, {"stages.0.group_size": 128}]
    assert chosen(study(search={"kind": "list", "runs": runs})) == runs


def test_the_base_is_a_gallery_name_a_file_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text(gallery()["gptq-w4a16"].read_text())
    axes = [axis("stages.0.group_size", 32, 64)]
    as_mapping = yaml.safe_load(file.read_text())
    several = [list(points(load_study(study(base=base, axes=axes)))) for base in ("gptq-w4a16", str(file), as_mapping)]
    assert several[0] == several[1] == several[2]
    assert as_mapping == yaml.safe_load(file.read_text())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"axis": []}, "unknown key 'axis'; did you mean 'axes'?"),
        ({"base": None}, "base: name a gallery recipe or a recipe file, or write a recipe's keys"),
        ({"axes": [{"key": "seed", "valus": [1]}]}, "the study lacks 'axes.0.values' (and 1 more)"),
        ({"axes": [axis("seed", 1, wen={})]}, "unknown key 'axes.0.wen'; did you mean 'when'?"),
        ({"evaluations": [{"windows": 0}]}, "evaluations.0.windows should be greater than or equal to 1, not 0"),
        ({"evaluations": [{"txt": "a"}]}, "unknown key 'evaluations.0.txt'; did you mean 'text'?"),
        ({"evaluations": [{"generate": 0}]}, "evaluations.0.generate should be greater than or equal to 1, not 0"),
        (
            {"evaluations": [{"chunk": 8, "generate": 1}]},
            "evaluations.0: 'generate' does not work with 'chunk'; remove one of the two",
        ),
        ({"evaluations": EVALUATIONS * 2}, "two evaluations are the same; remove one"),
        ({"axes": [axis("output", "a")]}, "'output' cannot be an axis, since each run has its own folder; remove it"),
        ({"axes": [axis("seed", 1)], "seeds": [0]}, "'seeds' already varies 'seed'; remove one of the two"),
        (
            {"axes": [axis("device", "cpu")], "search": {"kind": "list", "runs": [{"seed": 1}]}},
            "search.runs already lists the runs; remove 'axes' or 'search'",
        ),
        ({"axes": [axis("stages.3.scheme", "W4A16")]}, "axis stages.3.scheme: '3' is no position in a list of 1"),
        ({"axes": [axis("stages.0.method.name", 1)]}, "axis stages.0.method.name: 'method' holds a plain value"),
        (
            {"axes": [axis("stages.0.groupsize", 32)]},
            "axis stages.0.groupsize names no key of the recipe: unknown key 'stages.0.groupsize'; did you mean 'group",
        ),
        (
            {"base": {"stages": [RTN], "calibration": {"dataset": "x"}}, "axes": [axis("calibration.samples.n", 32)]},
            "axis calibration.samples.n names no key of the recipe: unknown key 'calibration.samples'",
        ),
        (
            {"axes": [axis("stages.0.method", "rtn", "rnt")]},
            "run with method=rnt: unknown method 'rnt' in stages.0; did",
        ),
        (
            {"axes": [axis("stages.0.group_size", 32, when={"stages.0.method": "gptq"})]},
            "axes.0 (stages.0.group_size) never applies: no recipe has method=gptq written in it",
        ),
        ({"axes": [axis("stages.0.group_size", *range(1, 502))]}, "the study has more than 500 runs; remove values"),
        # As many as can only be counted, not made.
        ({"axes": [axis(key, *range(999)) for key in KEYS]}, "the study has more than 500 runs;"),
        ({"axes": [axis("output.x", "a")]}, "'output' cannot be an axis, since each run has its own folder; remove it"),
        (
            {"axes": [{"key": "seed", "values": 3}]},
            "axes.0.values: write a list, as in [32, 64], or a mapping of names to values",
        ),
        ({"axes": [{"key": "seed", "values": {None: 3}}]}, "axes.0.values: write a list, as in [32, 64], or a mapping"),
        ({"search": {"kind": "bayes"}}, "search: name its 'kind', one of grid, list, random"),
        ({"search": {"n": 2}}, "search: name its 'kind', one of grid, list, random"),
        (
            {"axes": [axis("seed", 1), axis("seed", 2)]},
            "two axes vary seed of one recipe; merge them, or give them a 'when' that excludes the other",
        ),
        (
            {"evaluations": [{"text": "a"}, {"text": "a", "chunk": 8}]},
            "evaluations.1 reads through a quantized cache, and no recipe has one; remove its 'chunk', or ",
        ),
        ({"axes": []}, "no model; write 'model' in the study, or in its base"),
    ],
)
def test_what_is_wrong_is_one_line(laconic: Laconic, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study(**keys)))
    assert laconic("sweep", file, "-o", tmp_path / "out").complaint.startswith(said)
    assert {f.name for f in tmp_path.iterdir()} == {"study.yaml"}


def test_a_file_that_is_no_study_is_told(laconic: Laconic, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    assert laconic("sweep", file, "-o", tmp_path / "out").complaint == f"no study '{file}'; check the path"
    file.write_text("- 1")
    assert laconic("sweep", file, "-o", tmp_path).complaint == f"{file} is not a study; write a 'base' and 'axes'"
    file.write_text("a: [")
    assert laconic("sweep", file, "-o", tmp_path).complaint.startswith(f"{file} is not valid YAML in line 1")


def test_runs_that_would_write_one_folder_are_told(llama: Path) -> None:
    memory = study(model=str(llama), base={"stages": [RTN], "calibration": {"dataset": "x"}})
    memory["axes"] = [axis("calibration.max_memory_gb", 1, 2)]
    with pytest.raises(
        ValueError, match=r"runs 1 \(max_memory_gb=1\) and 2 \(max_memory_gb=2\) would write one folder"
    ):
        plan_runs(load_study(memory))
    twice = study(model=str(llama), axes=[axis("stages.0.group_size", 32, 64, 32)])
    with pytest.raises(ValueError, match=r"runs 1 \(group_size=32\) and 3 \(group_size=32\) would write one folder"):
        plan_runs(load_study(twice))


def test_a_run_is_known_by_what_its_result_depends_on(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    asked = study(model=str(llama), evaluations=[{"text": str(text)}])

    def id_of(**keys: Any) -> str:
        (run,) = plan_runs(load_study(asked | keys))
        return run.id

    ids = [
        id_of(),
        id_of(base={"stages": [RTN | {"group_size": 64}]}),
        id_of(evaluations=[{"text": str(text), "windows": 3}]),
        id_of(evaluations=[{"text": str(text), "generate": 3}]),
        id_of(baseline=False),
        id_of(seeds=[1]),
    ]
    text.write_text("two!")
    assert len({*ids, id_of()}) == 7
    # None of these matters: not how it was asked for, not what it may take.
    same = {id_of(), id_of(base={"stages": [RTN], "device": "cpu"}), id_of(resources={"cpus": 1})}
    assert same | {id_of(axes=[axis("stages.0.group_size", 32)])} == {id_of()}


STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


def test_the_ready_studies_are_valid() -> None:
    assert len(STUDIES) >= 12
    for file in STUDIES:
        found = list(points(load_study(file)))
        assert len(found) > 3
        for point in found:
            load_recipe(point.recipe)


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_ready_studies_have_runs_that_can_be(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo model, with short texts in the places that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(file.parents[1] / "models")
    (tmp_path / "build").mkdir()
    study = load_study(file)
    texts = {evaluation.text for evaluation in study.evaluations}
    texts |= {recipe.calibration.dataset for p in points(study) if (recipe := load_recipe(p.recipe)).calibration}
    for name in texts:
        Path(name).write_text(make_text(4000))
    for row in dry_run(study, tmp_path / "out"):
        assert "problem" not in row, row
        assert row["state"] == "to do"
