"""The page of a laboratory: fronts, ablations, maps and a checklist, each saying what was measured and nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pareto import Reader

from commands import Laconic
from laconic.report.chart import Axis, Mark, Series, chart, standalone, ticks_between
from laconic.report.criteria import checklist, judge_entry
from laconic.report.entries import ReportEntry, read_entries
from laconic.report.headline_table import dominated_entries, headline_rows
from laconic.report.page import write_page
from laconic.report.plots import ablations, bit_map, error_map, size_front

SVG = "{http://www.w3.org/2000/svg}"


def evaluation(kl: float = 0.1, **keys: Any) -> dict[str, Any]:
    return {
        "model": "out/a", "baseline": "base", "text": "t.txt", "context_length": 32, "windows": 4, "dtype": "float32",
        "perplexity": 8 * (1 + kl), "baseline_perplexity": 8.0, "kl_mean": kl, "kl_p99": 10 * kl, "top1_agreement": 0.9,
        "file_bytes": 1000, "baseline_file_bytes": 4200, "bits_per_weight": 4.2, "baseline_bits_per_weight": 16.0,
        "schemes": {"W4A16": 3}, "simulated": False, "parameters": 30_000_000, "command": "laconic eval out/a",
    } | keys  # fmt: skip


def study(folder: Path, *, seeds: int = 2) -> Path:
    """What a sweep over group sizes and methods leaves, one run of it failed."""
    (folder / "results").mkdir(parents=True)
    artifacts = []
    for method, size, seed in [(m, g, s) for m in ("rtn", "gptq") for g in (32, 128) for s in range(seeds)]:
        run = f"{method}{size}{seed}"
        kl = {"rtn": 0.2, "gptq": 0.1}[method] * size / 32 + 0.01 * seed
        result: dict[str, Any] = {
            "run": run, "values": {"stages.0.method": method, "group_size": size, "seed": seed}, "status": "done",
            "artifact": f"runs/{run}", "recipe": {"stages": [{"method": method}]}, "error": None, "seconds": 3.0,
            "compress": {"seconds": 2.0, "peak_memory_bytes": 5e8, "command": "laconic sweep s.yaml", "device": "cpu",
                         "threads": 2, "versions": {"torch": "2"}, "simulated": False},
            "evaluations": [evaluation(kl, file_bytes=1000 + 10 * (32 - size % 100))],
        }  # fmt: skip
        artifacts.append(result["artifact"])
        (folder / "results" / f"{run}.json").write_text(json.dumps(result))
    failed = {"run": "x", "values": {"stages.0.method": "awq", "group_size": 7, "seed": 0}, "status": "failed",
              "artifact": "runs/x", "recipe": {"stages": []}, "error": "7 divides nothing"}  # fmt: skip
    (folder / "results" / "x.json").write_text(json.dumps(failed))
    pq.write_table(pa.table({"artifact": [*artifacts, "runs/x"]}), folder / "results.parquet")
    return folder


def entry(**keys: Any) -> ReportEntry:
    return ReportEntry(**{"path": Path("a"), "recipe": None, "log": [], "compression": None, "evaluations": [], **keys})


def linear(name: str, error: float, scheme: str = "W4A16") -> dict[str, Any]:
    return {"event": "linear", "linear": f"model.layers.{name}", "scheme": scheme, "output_error": error}


# --- charts ---


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    found = ticks_between(low, high)
    assert len(found) <= 7
    assert all(low - 1e-6 * span - 1e-9 <= v <= high + 1e-6 * span + 1e-9 for v in found)


@given(
    st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 1e4)), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_marks_lie_inside_in_the_order_of_their_values(
    points: list[tuple[float, float]], log_x: bool, log_y: bool
) -> None:
    marks = [Mark(x, y, f"{i}") for i, (x, y) in enumerate(points)]
    drawn = ElementTree.fromstring(
        chart("a < b", [Series("", marks, line=True)], Axis("x", log=log_x), Axis("y", log=log_y))
    )
    _, _, width, height = map(float, drawn.get("viewBox", "").split())
    places = {}
    for g in drawn.iter(f"{SVG}g"):
        circle = g.find(f"{SVG}circle")
        assert circle is not None
        places[int(g.get("data-tooltip", ""))] = float(circle.get("cx", "")), float(circle.get("cy", ""))
    assert len(places) == len(points)
    for i, (x, y) in enumerate(points):
        assert 0 <= places[i][0] <= width
        assert 0 <= places[i][1] <= height
        for j, (other_x, other_y) in enumerate(points):
            if x < other_x:
                assert places[i][0] <= places[j][0]
            if y < other_y:
                assert places[i][1] >= places[j][1]


def test_what_a_logarithm_has_not_is_left_out_and_nothing_makes_no_picture() -> None:
    marks = [Mark(1, 0.0, "none"), Mark(2, 1.0, "some"), Mark(3, float("nan"), "lost")]
    drawn = chart("t", [Series("", marks)], Axis("x"), Axis("y", log=True))
    assert "some" in drawn
    assert "none" not in drawn
    assert "lost" not in drawn
    assert chart("t", [Series("", marks[:1])], Axis("x"), Axis("y", log=True)) == ""


def test_a_picture_of_its_own_has_its_colours() -> None:
    drawn = standalone(chart("t", [Series("", [Mark(1, 1, "one")])], Axis("x"), Axis("y")))
    assert ElementTree.fromstring(drawn).find(f"{SVG}style") is not None


# --- what is shown ---


def test_the_beaten_are_grey() -> None:
    entries = [
        entry(name="small", evaluations=[evaluation(0.3, bits_per_weight=2.0, file_bytes=500)]),
        entry(name="beaten", evaluations=[evaluation(0.3, bits_per_weight=4.0, file_bytes=1000)]),
        entry(name="good", evaluations=[evaluation(0.1, bits_per_weight=4.0, file_bytes=1000)]),
        entry(name="alone", evaluations=[evaluation(0.1, kl_mean=None, baseline_perplexity=None)]),
    ]
    assert dominated_entries(entries) == [False, True, False, False]
    drawn = ElementTree.fromstring(size_front(entries))
    faint = [g.get("data-tooltip", "") for g in drawn.iter(f"{SVG}g") if "faint" in ElementTree.tostring(g, "unicode")]
    assert [told.partition(":")[0] for told in faint] == ["beaten"]


def test_a_study_is_read_in_the_order_of_its_table(tmp_path: Path) -> None:
    entries = read_entries([study(tmp_path / "s")])
    assert [e.path.name for e in entries] == [
        "rtn320", "rtn321", "rtn1280", "rtn1281", "gptq320", "gptq321", "gptq1280", "gptq1281", "x"
    ]  # fmt: skip
    assert entries[-1].error == "7 divides nothing"
    rows = headline_rows(entries)
    assert rows[0]["stages.0.method"] == "rtn"
    assert rows[-1]["stages.0.method"] == "awq (failed: 7 divides nothing)"
    assert "task retention" not in rows[0], "nothing was measured of it"


def test_ablations_average_over_seeds_and_bars_reach_from_lowest_to_highest(tmp_path: Path) -> None:
    by_method, by_size = ablations(read_entries([study(tmp_path / "s")]))
    told = [g.get("data-tooltip") for g in ElementTree.fromstring(by_size).iter(f"{SVG}g")]
    assert "rtn, group_size 32: 0.2050, 0.2000 to 0.2100 over 2 seeds" in told
    assert "gptq, group_size 128: 0.4050, 0.4000 to 0.4100 over 2 seeds" in told
    assert "32, stages.0.method gptq: 0.1050, 0.1000 to 0.1100 over 2 seeds" in by_method
    assert len(ElementTree.fromstring(by_size).findall(f".//{SVG}path[@class]")) == 4


def test_maps_have_a_cell_for_every_linear_of_the_last_stage() -> None:
    log = [
        linear("0.mlp.up", 0.5),
        linear("0.mlp.up", 0.1),
        linear("1.mlp.up", 0.2, "W8A16"),
        linear("1.mlp.down", 0.4),
    ]
    drawn = ElementTree.fromstring(error_map(entry(name="a", log=log)))
    assert sorted(g.get("data-tooltip", "") for g in drawn.iter(f"{SVG}g")) == [
        "block 0, mlp.up: 1.00e-01", "block 1, mlp.down: 4.00e-01", "block 1, mlp.up: 2.00e-01"
    ]  # fmt: skip
    assert "block 1, mlp.up: 8 bits" in bit_map(entry(name="a", log=log))
    assert bit_map(entry(name="a", log=log[:2])) == "", "all alike"
    assert error_map(entry(name="a")) == ""


# --- the checklist ---


def verdicts(e: ReportEntry) -> dict[str, tuple[str, str]]:
    return {title: (v.status, v.figure) for title, v in judge_entry(e)}


def test_nothing_is_met_without_a_measurement() -> None:
    assert {status for status, _ in verdicts(entry()).values()} == {"not measured"}


def tasks(difference: float, recovery: float = 0.99) -> dict[str, Any]:
    row = {"task": "mmlu", "metric": "acc", "difference": difference, "difference_stderr": 0.004}
    return {"baseline": "base", "rows": [row], "mean_retention": recovery}


def told(recovery: float, stderr: float) -> dict[str, Any]:
    """A task whose original has 0.5."""
    row = {"task": "piqa", "metric": "acc", "main": True, "baseline": 0.5, "difference_stderr": stderr}
    return {"baseline": "base", "rows": [row], "mean_retention": recovery}


@pytest.mark.parametrize(
    ("keys", "title", "expected"),
    [
        ({"evaluations": [evaluation()]}, "weight memory at most 1/4", ("met", "files 4.20x smaller than in BF16")),
        (
            {"evaluations": [evaluation(baseline_bits_per_weight=32.0, baseline_file_bytes=6000)]},
            "weight memory at most 1/4",
            ("missed", "files 3.00x smaller than in BF16"),
        ),
        (
            {"evaluations": [evaluation()], "tasks": [tasks(0.0)]},
            "MMLU drop at most 2",
            ("not measured", "a model of 30 million parameters"),
        ),
        (
            {"evaluations": [evaluation(parameters=8e9)], "tasks": [tasks(-0.011)]},
            "MMLU drop at most 2",
            ("met", "-1.1 ± 0.4 points"),
        ),
        (
            {"evaluations": [evaluation(parameters=8e9)], "tasks": [tasks(-0.021)]},
            "MMLU drop at most 2",
            ("missed", "-2.1 ± 0.4 points"),
        ),
        (
            {"evaluations": [evaluation(parameters=8e9)]},
            "MMLU drop at most 2",
            ("not measured", "no MMLU result with the original"),
        ),
        ({"tasks": [tasks(0, 0.97)]}, "mean task retention", ("missed", "97.0%")),
        ({"tasks": [tasks(0, 0.99), told(1.14, 0.08)]}, "mean task retention", ("met", "99.0%")),
        (
            {"tasks": [told(1.14, 0.08)]},
            "mean task retention",
            ("not measured", "114.0% ± 16.0%, too few documents to decide"),
        ),
        ({"tasks": [told(0.96, 0.004)]}, "mean task retention", ("missed", "96.0% ± 0.8%")),
        (
            {"speeds": [{"models": [{"decode": {"speedup": 1.0}}, {"decode": {"speedup": 1.9}}]}]},
            "decoding speed at least 1.8x",
            ("met", "1.90x the original"),
        ),
    ],
)
def test_a_bar_is_judged_by_what_was_measured(keys: dict[str, Any], title: str, expected: tuple[str, str]) -> None:
    found = next(v for t, v in verdicts(entry(**keys)).items() if t.startswith(title))
    assert found == expected


@pytest.mark.parametrize(("length", "status"), [(32768, "met"), (8192, "not measured")])
def test_a_cache_is_judged_at_long_contexts_alone(length: int, status: str) -> None:
    def row(nbytes: int, speed: float) -> dict[str, list[dict[str, Any]]]:
        return {
            "memory": [{"length": length, "request_bytes": nbytes}],
            "speed": [{"length": length, "tokens_per_second": speed}],
        }

    plain, small = row(1000, 10.0), row(250, 14.0)
    long = {"caches": ["16 bit", "kivi"], **{k: {"16 bit": plain[k], "kivi": small[k]} for k in plain}}
    found = verdicts(entry(long=[long]))
    assert found["cache memory at most 1/2 at 32k-64k tokens"][0] == status
    assert found["throughput at least 1.3x at 32k-64k tokens"][0] == status


def test_a_checklist_names_who_has_which_figure() -> None:
    two = [entry(name="a", evaluations=[evaluation()]), entry(name="b", evaluations=[evaluation(file_bytes=2000)])]
    lines = dict(checklist(two))
    assert lines["weight memory at most 1/4 of BF16"] == [
        ("met", "a: files 4.20x smaller than in BF16"), ("missed", "b: files 2.10x smaller than in BF16")
    ]  # fmt: skip
    assert lines["mean task retention at least 98 %"] == [("not measured", "no task results with the original")]


# --- what can be compared ---


def artifact(folder: Path, *evaluations: dict[str, Any], sha: str = "a") -> Path:
    (folder / "results").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(f"source: {{sha256: {sha}}}")
    for i, result in enumerate(evaluations):
        (folder / "results" / f"eval-{i}.json").write_text(json.dumps(result))
    return folder


def test_a_picture_shows_what_was_measured_alike(tmp_path: Path) -> None:
    here, there = evaluation(0.1), evaluation(0.2, text="other.txt")
    folders = [
        artifact(tmp_path / "both", there, here),
        artifact(tmp_path / "one", here),
        artifact(tmp_path / "odd", there | {"dtype": "bfloat16", "kl_mean": 0.001}),
    ]
    entries = read_entries(folders)
    assert [e.quality and e.quality["kl_mean"] for e in entries] == [0.1, 0.1, 0.001]
    assert size_front(entries).count("data-tooltip") == 2
    assert dominated_entries(entries) == [False] * 3
    write_page(entries, tmp_path / "p.html")
    assert "measured in another setting: odd." in (tmp_path / "p.html").read_text()
    assert len(list(csv.DictReader((tmp_path / "p.csv").open()))) == 4, "a row an evaluation"


def test_task_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", evaluation())
    old = {"baseline": "base", "rows": [{"task": "a", "recovery": 0.9}], "mean_recovery": 0.9}
    (folder / "results" / "tasks-a.json").write_text(json.dumps(old))
    (read,) = read_entries([folder])
    assert read.retention == 0.9
    assert read.tasks[0]["rows"][0]["retention"] == 0.9


def test_artifacts_of_different_models_are_not_drawn_together(tmp_path: Path, laconic: Laconic) -> None:
    folders = [
        artifact(tmp_path / "a", evaluation()),
        artifact(tmp_path / "b", evaluation(baseline="other"), sha="b"),
    ]
    said = laconic("report", *folders, "-o", tmp_path / "p.html").complaint
    assert "are of different models" in said
    assert not (tmp_path / "p.html").exists()


# --- the page ---


def test_one_page_of_a_study_that_needs_nothing_else(tmp_path: Path, laconic: Laconic) -> None:
    page = tmp_path / "lab.html"
    ran = laconic("report", study(tmp_path / "s"), "-o", page, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["files"] == [str(tmp_path / f"lab.{kind}") for kind in ("html", "md", "csv")]
    html = page.read_text()
    reader = Reader()
    reader.feed(html)
    assert (reader.open, reader.links, reader.scripts) == ([], [], 1)
    assert len(html) < 200_000
    assert html.count("<svg") == 3
    assert "9 artifacts, 1 of which failed" in html
    assert 'class="failed"' in html
    rows = list(csv.DictReader((tmp_path / "lab.csv").open()))
    assert [float(r["kl_mean"]) for r in rows if r["stages.0.method"] == "gptq"] == pytest.approx(
        [0.1, 0.11, 0.4, 0.41]
    )
    assert "laconic sweep s.yaml" in (tmp_path / "lab.md").read_text()


def test_continuations_stand_side_by_side(tmp_path: Path) -> None:
    sample = {"prompt": "Once", "original": " upon a time", "written": " upon <a> tree"}
    result = {"baseline": "base", "samples": [sample], "command": "laconic eval"}
    write_page([entry(name="a", samples=[result]), entry(name="b", samples=[result])], tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    assert html.count("upon a time") == 1
    assert html.count("upon &lt;a&gt; tree") == 2


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {"evaluations": []},
        {"evaluations": "x"},
        {"evaluations": [{}]},
        {"evaluations": [evaluation(kl_mean="x")]},
        {"evaluations": [evaluation(file_bytes="1")]},
        {"values": [1]},
        {"compress": "x"},
    ],
)
def test_a_broken_result_of_a_study_is_told(tmp_path: Path, laconic: Laconic, keys: dict[str, Any] | None) -> None:
    folder = study(tmp_path / "s")
    file = folder / "results" / "rtn320.json"
    file.write_text("[]" if keys is None else json.dumps(json.loads(file.read_text()) | keys))
    said = laconic("report", folder, "-o", tmp_path / "p.html").complaint
    assert said.endswith("rtn320.json is not a result of a sweep; delete it, and run 'laconic sweep' again")


def test_a_broken_table_or_recipe_of_a_study_is_told(tmp_path: Path, laconic: Laconic) -> None:
    folder = study(tmp_path / "s")
    artifact = folder / "runs" / "rtn320"
    artifact.mkdir(parents=True)
    (artifact / "config.json").write_text("{}")
    (artifact / "recipe.yaml").write_text("{[")
    said = laconic("report", folder, "-o", tmp_path / "p.html").complaint
    assert said.endswith("rtn320.json is not a result of a sweep; delete it, and run 'laconic sweep' again")
    (artifact / "recipe.yaml").unlink()
    table = folder / "results.parquet"
    for broken in (b"", b"PAR1junk"):
        table.write_bytes(broken)
        said = laconic("report", folder, "-o", tmp_path / "p.html").complaint
        assert said == f"{table} is not a table of a sweep; run 'laconic sweep' again, which rewrites it"
    pq.write_table(pa.table({"x": [1]}), table)
    assert "is not a table of a sweep" in laconic("report", folder, "-o", tmp_path / "p.html").complaint
