"""A study worked through: what is done stays done, what fails is told, a kill loses at most the run in flight."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import laconic.sweep.measure as measuring
import laconic.sweep.runner as runner
from artifacts import press
from commands import Laconic
from interruptions import Killed
from laconic.evaluation.options import TextOptions
from laconic.evaluation.text import evaluate_text
from laconic.sweep.runner import dry_run, sweep
from laconic.sweep.study import Study, load_study

RTN = {"method": "rtn", "scheme": "W8A16"}
# Of a study, to have it need calibration.
GPTQ = ("base.stages.0.method=gptq", "base.calibration.max_seq_length=32")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ray is not installed."""
    monkeypatch.setattr(runner, "_ray_installed", lambda: False)


@pytest.fixture
def asked(llama: Path, text: Path) -> dict[str, Any]:
    return {
        "base": {"stages": [RTN], "calibration": {"dataset": str(text)}},
        "model": str(llama),
        "axes": [{"key": "stages.0.scheme", "values": ["W8A16", "W4A16", "W6A6"]}],
        "evaluations": [{"text": str(text), "context_length": 32, "windows": 4, "dtype": "float32"}],
    }


@pytest.fixture
def study(asked: dict[str, Any]) -> Study:
    """Three runs, the second of which cannot be: groups of 128 divide no 64 inputs."""
    return load_study(asked)


def test_every_run_is_made_and_measured_as_by_itself(llama: Path, text: Path, tmp_path: Path, study: Study) -> None:
    rows = sweep(study, tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    for row, scheme in ((rows[0], "W8A16"), (rows[2], "W6A6")):
        artifact = press(llama, tmp_path / scheme, RTN | {"scheme": scheme})
        alone = evaluate_text(
            artifact.path,
            TextOptions(baseline=str(llama), text=str(text), context_length=32, windows=4, dtype="float32"),
        )
        for figure in ("perplexity", "baseline_perplexity", "kl_mean", "bits_per_weight", "file_bytes", "tokens"):
            assert row[figure] == alone[figure]
        assert (tmp_path / "out" / row["artifact"] / "config.json").exists()
    assert rows[0]["kl_mean"] < rows[2]["kl_mean"]


def test_the_table_holds_what_the_results_say(tmp_path: Path, study: Study) -> None:
    rows = sweep(study, tmp_path)
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [r["stages.0.scheme"] for r in table] == ["W8A16", "W4A16", "W6A6"]
    for row, read in zip(rows, table, strict=True):
        result = json.loads((tmp_path / "results" / f"{row['run']}.json").read_text())
        assert (read["run"], read["status"], read["error"]) == (result["run"], result["status"], result["error"])
        if result["status"] == "done":
            assert read["perplexity"] == result["evaluations"][0]["perplexity"]
            assert read["compress_seconds"] == result["compress"]["seconds"]
            assert result["recipe"]["stages"][0]["scheme"] == read["stages.0.scheme"]
        else:
            assert read["perplexity"] is None
    assert "group_size 128 does not divide the 64 inputs" in table[1]["error"]


@pytest.mark.parametrize("kept", [True, False], ids=["artifacts", "results alone"])
def test_what_each_run_writes_stands_side_by_side_on_the_page(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path, asked: dict[str, Any], kept: bool
) -> None:
    asked["axes"][0]["values"] = ["W8A16", "W2A16"]
    asked["base"]["stages"] = [RTN | {"group_size": 32}]
    asked["evaluations"][0]["generate"] = 2
    out = tmp_path / "out"
    rows = sweep(load_study(asked), out)
    written = {}
    for row, scheme in zip(rows, ("W8A16", "W2A16"), strict=True):
        (measured,) = json.loads((out / "results" / f"{row['run']}.json").read_text())["evaluations"]
        made = press(llama, tmp_path / scheme, RTN | {"scheme": scheme, "group_size": 32}).path
        how = {"text": str(text), "context_length": 32, "windows": 4, "dtype": "float32", "generate": 2}
        assert measured["samples"] == evaluate_text(made, TextOptions(baseline=str(llama), **how))["samples"]
        assert len(measured["samples"]) == 2
        written[scheme] = measured["samples"]
    if not kept:
        shutil.rmtree(out / "runs")
    assert laconic("report", out, "-o", tmp_path / "page.html").code == 0
    shown = read_figures((tmp_path / "page.html").read_text())
    expected = [
        [("original", eight["original"]), ("W8A16", eight["written"]), ("W2A16", two["written"])]
        for eight, two in zip(*written.values(), strict=True)
    ]
    assert shown == [each for row in expected for each in row]


def read_figures(html: str) -> list[tuple[str, str]]:
    """Of each continuation on a page, who wrote it, and what."""
    found = re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", html, re.DOTALL)
    return [(unescape(who), unescape(what)) for who, what in found]


def test_axes_of_mixed_kinds_fit_into_a_column(tmp_path: Path, asked: dict[str, Any]) -> None:
    runs = [
        {"stages.0.group_size": 32, "stages.0.scheme": "W4A16", "seed": 1},
        {"stages": [{"method": "rtn", "scheme": "W8A8"}], "stages.0.dynamic": True},
        {"stages.0.dynamic": "no"},
    ]
    del asked["axes"]
    rows = [dict(row) for row in sweep(load_study(asked | {"search": {"kind": "list", "runs": runs[:2]}}), tmp_path)]
    rows[0]["values"] = rows[0]["values"] | {"stages.0.dynamic": "no"}
    runner.write_table(rows, tmp_path / "mixed.parquet")
    read = pq.read_table(tmp_path / "mixed.parquet").to_pydict()
    assert read["stages.0.dynamic"] == ['"no"', "true"]
    assert read["stages.0.group_size"] == [32, None]
    assert read["stages"] == [None, '[{"method": "rtn", "scheme": "W8A8"}]']


def test_what_is_done_is_not_done_again(tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sweep(study, tmp_path)
    begun: list[str] = []

    def watch(event: Any) -> None:
        if event.get("state") == "started":
            begun.append(event["run"])

    again = sweep(study, tmp_path, report=watch)
    assert begun == [rows[1]["run"]]  # what failed is tried again
    assert again == rows


@pytest.mark.parametrize("moment", ["compressing", "measuring"])
def test_a_kill_loses_at_most_the_run_in_flight(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    expected = sweep(study, tmp_path / "expected")
    third = expected[2]["run"]

    def watch(event: Any) -> None:
        if event["run"] == third and event["event"] == "block" and moment == "compressing":
            raise Killed

    def measure(folder: Path, options: TextOptions) -> Any:
        if folder.name == third and moment == "measuring":
            raise Killed
        return evaluate_text(folder, options)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "evaluate_text", measure)
        with pytest.raises(Killed):
            sweep(study, tmp_path / "out", report=lambda e: watch({"run": None} | dict(e)))
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    assert table["status"] == ["done", "failed", "not run"]
    assert (tmp_path / "out" / "runs" / third).exists() == (moment == "measuring")
    compressed: list[Any] = []
    sweep(study, tmp_path / "out", report=lambda e: compressed.append((e.get("run"), e["event"])))
    assert ((third, "block") in compressed) == (moment == "compressing")
    done = pq.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    for figure in ("run", "status", "error", "perplexity", "kl_mean", "file_bytes"):
        assert done[figure] == [row[figure] for row in expected]


def test_a_defect_of_ours_fails_one_run_and_leaves_its_traceback(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(measuring, "evaluate_text", broken)
    rows = sweep(study, tmp_path)
    assert rows[0]["error"] == "RuntimeError: out of memory"
    assert "in broken" in json.loads((tmp_path / "results" / f"{rows[0]['run']}.json").read_text())["traceback"]
    assert [row["status"] for row in rows] == ["failed"] * 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"run": "other", "status": "done"}', '{"status": "done"}'])
def test_a_corrupt_result_is_told_and_kept(worked: tuple[Path, Study], damage: str) -> None:
    folder, study = worked
    rows = sweep(study, folder)
    file = folder / "results" / f"{rows[0]['run']}.json"
    file.write_text(damage)
    with pytest.raises(ValueError, match=f"{file} is .*; delete it, and the sweep repeats that run"):
        sweep(study, folder)
    assert file.read_text() == damage
    file.unlink()
    assert sweep(study, folder)[0]["perplexity"] == rows[0]["perplexity"]


@pytest.fixture(scope="module")
def worked(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A study of one run, worked through. Not to be changed: a test that damages it puts it back."""
    asked = {
        "base": {"stages": [RTN]},
        "model": str(llama),
        "evaluations": [{"text": str(text), "context_length": 32, "windows": 4}],
    }
    folder = tmp_path_factory.mktemp("worked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_ray_installed", lambda: False)
        assert sweep(load_study(asked), folder)[0]["status"] == "done"
    return folder, load_study(asked)


@pytest.mark.parametrize(
    "keys",
    [
        {"evaluations": "x"},
        {"evaluations": [1]},
        {"evaluations": [{}]},
        {"evaluations": [{"text": "t", "perplexity": "x"}]},
        {"evaluations": [{"text": "t", "perplexity": 2.0, "file_bytes": 1e999}]},
        {"compress": "x"},
        {"compress": {"seconds": "x"}},
        {"artifact": 3},
        {"values": None},
        {"seconds": "x"},
    ],
)
def test_a_result_that_was_changed_is_told_and_kept(worked: tuple[Path, Study], keys: dict[str, Any]) -> None:
    folder, study = worked
    (file,) = (folder / "results").glob("*.json")
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | keys))
    changed = file.read_text()
    try:
        with pytest.raises(ValueError, match=f"{file} is not the result of run .*; delete it, and the sweep repeats"):
            sweep(study, folder)
        assert file.read_text() == changed
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("name", ["recipe.yaml", "results/compress.json"])
def test_an_artifact_that_is_not_whole_is_told_and_kept(worked: tuple[Path, Study], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(worked[0], tmp_path / "out"))
    (result,) = (folder / "results").glob("*.json")
    artifact = folder / "runs" / result.stem
    result.unlink()
    (artifact / name).unlink()
    (row,) = sweep(worked[1], folder)
    assert row["error"] == (
        f"{artifact} is not a complete artifact of this run; move it away, and the sweep makes it again"
    )
    assert list(artifact.glob("*.safetensors"))
    artifact.rename(tmp_path / "away")
    assert sweep(worked[1], folder)[0]["status"] == "done"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["evaluations.0.text=nowhere.txt"], "evaluations.0: no text file 'nowhere.txt'; check the path"),
        (["evaluations.0.text=short.txt"], "evaluations.0: the evaluation text has "),
        (
            ["evaluations.0.generate=5"],
            "evaluations.0: generate 5 is more than the 4 windows of the text; lower it",
        ),
        (["evaluations.0.context_length=99999"], "evaluations.0: context_length 99999 is longer than the model's "),
        (["base.calibration.dataset=nowhere.txt"], "run with scheme=W8A16: no text file 'nowhere.txt'; check the path"),
        (["base.calibration.dataset=short.txt"], "run with scheme=W8A16: the calibration text has "),
        (["base.calibration=null"], "run with scheme=W8A16: gptq needs calibration text: add 'calibration: "),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_text_that_will_not_do_is_told_before_the_first_run(
    laconic: Laconic,
    tmp_path: Path,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    keys: list[str],
    said: str,
    dry: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a b")
    Path("study.yaml").write_text(yaml.safe_dump(asked))
    varied = [part for key in [*GPTQ, *keys] for part in ("--set", key)]
    ran = laconic("sweep", "study.yaml", "-o", "out", *varied, *["--dry-run"] * dry)
    assert ran.complaint.startswith(said)
    assert not list(tmp_path.glob("out/*"))


def test_a_text_that_is_gone_does_not_matter_to_what_is_done(tmp_path: Path, asked: dict[str, Any]) -> None:
    asked["axes"][0]["values"] = ["W8A16", "W6A6"]
    rows = sweep(load_study(asked), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "check_texts", lambda left: list(left) == [] or pytest.fail("checked what is done"))
        assert sweep(load_study(asked), tmp_path) == rows


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, study: Study) -> None:
    def watch(event: Any) -> None:
        if event["event"] == "sweep":
            with pytest.raises(ValueError, match="another process is writing"):
                sweep(study, tmp_path)
            raise Killed

    with pytest.raises(Killed):
        sweep(study, tmp_path, report=watch)


@pytest.mark.parametrize("name", ["", "results", "runs", "results.parquet/x"])
@pytest.mark.parametrize("dry", [False, True])
def test_what_stands_in_the_way_is_told_before_the_first_run(
    laconic: Laconic, tmp_path: Path, asked: dict[str, Any], name: str, dry: bool
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(asked))
    blocked = out / name
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("mine")
    said = laconic("sweep", file, "-o", out, *["--dry-run"] * dry).complaint
    assert said.endswith(("is no folder that you may write to", "is a folder; choose another name"))
    assert str(out) in said
    assert {f for f in tmp_path.rglob("*") if f.is_file()} == {blocked, file}


def test_a_dry_run_lists_and_writes_nothing(
    laconic: Laconic, tmp_path: Path, asked: dict[str, Any], study: Study
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(asked))
    listed = json.loads(laconic("sweep", file, "-o", out, "--dry-run", "--json").out)["runs"]
    assert {f.name for f in tmp_path.iterdir()} == {"study.yaml"}
    assert [row["state"] for row in listed] == ["to do"] * 3
    assert "group_size 128 does not divide" in listed[1]["problem"]
    rows = sweep(study, out)
    assert [row["run"] for row in listed] == [row["run"] for row in rows]
    # A forecast is of tensors; a file has its names as well.
    assert 0 < rows[0]["file_bytes"] - listed[0]["bytes_after"] < 10_000
    assert [row["state"] for row in dry_run(study, out)] == ["done", "failed before", "done"]
    said = laconic("sweep", file, "-o", out, "--dry-run").out
    assert "3 runs, 2 done, 1 to do" in said
    assert "will fail: group_size 128" in " ".join(said.split())


def test_the_command_prints_a_table_and_tells_of_failures(
    laconic: Laconic, tmp_path: Path, asked: dict[str, Any]
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(asked))
    ran = laconic("sweep", file, "-o", out)
    assert ran.code == 2
    assert "1 of 3 runs failed, the first: " in ran.err
    assert "3 of 3, run" in ran.err
    for word in ("W8A16", "W6A6", "perplexity", f"table: {out}/results.parquet", "failed"):
        assert word in ran.out
    ran = laconic("sweep", file, "-o", out, "--set", "axes.0.values=[W8A16]", "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert [row["status"] for row in told["rows"]] == ["done"]


def test_a_cluster_needs_ray(laconic: Laconic, tmp_path: Path, asked: dict[str, Any]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(asked))
    ran = laconic("sweep", file, "-o", tmp_path / "out", "--address", "ray://nowhere:1")
    assert ran.complaint == "--address needs Ray: pip install 'laconic[ray]'"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install 'laconic[ray]')")
def test_ray_gives_the_same_results(tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(asked | {"resources": {"cpus": 1}})
    expected = sweep(study, tmp_path / "here")
    monkeypatch.undo()
    states: list[tuple[str, str]] = []
    rows = sweep(study, tmp_path / "there", report=lambda e: states.append((e["event"], e.get("state", ""))))
    for figure in ("run", "status", "error", "perplexity", "kl_mean", "file_bytes", "command"):
        assert [row[figure] for row in rows] == [row[figure] for row in expected]
    assert states.count(("run", "done")) == 2
    assert sweep(study, tmp_path / "there") == rows
