"""The Pareto report: domination by its definition, one page that needs nothing else, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import Laconic
from laconic.report.pareto import ParetoPoint, dominated, gather_points
from laconic.report.pareto_page import pareto_plots

BASE = "models/base"
SVG = "{http://www.w3.org/2000/svg}"


def artifact(
    folder: Path,
    *,
    kl: float = 0.1,
    nbytes: int = 1000,
    speed: float = 1.0,
    sparse: float | None = None,
    base: str = BASE,
    sha: str | None = "a",
    skip: str = "",
    **keys: Any,
) -> Path:
    """A folder with a recipe and results such as the commands leave there."""
    (folder / "results").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    source = f"source: {{model: {base}, sha256: {sha}}}\n" if sha else ""
    (folder / "recipe.yaml").write_text("stages: []\n" + source)
    evaluation = {
        "model": str(folder), "baseline": base, "text": "t.txt", "context_length": 32, "windows": 4, "dtype": "float32",
        "perplexity": 8 * (1 + kl), "baseline_perplexity": 8.0, "kl_mean": kl, "file_bytes": nbytes,
        "baseline_file_bytes": 2000, "command": f"laconic eval {folder}",
    }  # fmt: skip

    def row(name: str, x: float, gone: float = 0.5) -> dict[str, Any]:
        phase = {"tokens_per_second": 100 * x, "speedup": x}
        return {"name": name, "gone": gone, "prefill": phase, "decode": phase}

    rows = [row("base", 1.0, 0.0), row(folder.name, speed)]
    rows += [row(f"{folder.name}, sparse kernels", sparse)] if sparse else []
    bench = {
        "model": str(folder), "baseline": base, "models": rows, "device_name": "a CPU", "threads": 2, "prompt": 8,
        "sequences": 1, "dtype": "float32", "command": f"laconic bench sparsity {folder}",
    }  # fmt: skip
    for name, result in (("eval-t-32", evaluation), ("bench-sparsity-cpu", bench)):
        if not skip or not name.startswith(skip):
            (folder / "results" / f"{name}.json").write_text(json.dumps(result | keys))
    return folder


# --- domination ---

_few = st.sampled_from([0.0, 1.0, 2.0, 3.0])


@given(
    st.lists(st.tuples(_few, _few, _few), max_size=12)
    | st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), max_size=9)
)
def test_domination_is_its_definition(costs: list[tuple[float, ...]]) -> None:
    expected = [
        any(
            all(a <= b for a, b in zip(o, c, strict=True)) and any(a < b for a, b in zip(o, c, strict=True))
            for o in costs
        )
        for c in costs
    ]
    assert dominated(costs) == expected


def test_points_are_what_was_measured_and_the_beaten_are_known(tmp_path: Path) -> None:
    folders = [
        artifact(tmp_path / "good", kl=0.1, nbytes=900, speed=1.0, sparse=1.5),
        artifact(tmp_path / "beaten", kl=0.2, nbytes=900, speed=1.2),
        artifact(tmp_path / "small", kl=0.3, nbytes=500),
    ]
    points, how = gather_points(folders)
    assert [(p.name, p.dominated) for p in points] == [
        ("original", False), ("good", False), ("beaten", True), ("small", False)
    ]  # fmt: skip
    good = points[1]
    assert (good.gone, good.nbytes, good.kl, good.dense, good.speed) == (0.5, 900, 0.1, 100, 1.0)
    assert (good.sparse, good.sparse_speed, good.best_speed, good.prefill) == (150, 1.5, 1.5, 1.5)
    assert points[2].sparse is None
    assert points[0] == ParetoPoint("original", 0.0, 2000, 8.0, 0.0, 100.0, 1.0)
    assert how["commands"] == [f"laconic {c} {f}" for f in folders for c in ("eval", "bench sparsity")]


# --- the page ---


class Reader(HTMLParser):
    """Collects what a page would load, its tags, and whether they close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(v) for k, v in attrs if k in ("src", "href")]
        self.scripts += tag == "script"
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_opens_and_needs_nothing_else(tmp_path: Path, laconic: Laconic) -> None:
    folders = [
        artifact(tmp_path / "a<b>", kl=0.1, nbytes=900, sparse=1.5),
        artifact(tmp_path / "beaten", kl=0.2, nbytes=900, speed=0.9),
    ]
    page = tmp_path / "out" / "pareto.html"
    ran = laconic("report", "--pareto", *folders, "-o", page)
    assert ran.code == 0, ran.err
    assert "dominated" in ran.out
    html = page.read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert reader.links == []
    assert reader.scripts == 1
    assert len(html) < 40_000
    assert html.count('<tr class="dominated">') == 1
    assert "a&lt;b&gt;" in html
    assert "<td>a<b>" not in html
    assert "1 of 2 artifacts are Pareto-optimal" in html
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    assert [(r["name"], float(r["kl"]), r["dominated"]) for r in rows] == [
        ("original", 0.0, "False"), ("a<b>", 0.1, "False"), ("beaten", 0.2, "True")
    ]  # fmt: skip
    table = (tmp_path / "out" / "pareto.md").read_text()
    assert re.search(
        r"\| beaten \| 50\.0% \| 0\.00 MB \| 9\.600 \| 0\.2000 \| 90 \(0\.90x\) \| not available \|", table
    )
    assert f"laconic bench sparsity {folders[0]}" in table


def test_the_dominated_are_grey_in_the_picture(tmp_path: Path) -> None:
    points, _ = gather_points(
        [artifact(tmp_path / "good"), artifact(tmp_path / "beaten", kl=0.2, speed=0.9, sparse=0.95)]
    )
    by_sparsity, by_speed = map(ElementTree.fromstring, pareto_plots(points))
    groups = {str(g.get("data-tooltip")): g for g in by_sparsity.iter(f"{SVG}g")}
    faint = {told.partition(":")[0]: "faint" in g.find(f"{SVG}circle").get("class", "") for told, g in groups.items()}
    assert faint == {"original": False, "good": False, "beaten": True}
    told = [g.get("data-tooltip", "") for g in by_speed.iter(f"{SVG}g")]
    assert [t.rpartition(", ")[2] for t in told if t.startswith("beaten")] == [
        "0.90x with dense kernels",
        "0.95x with sparse kernels",
    ]


def test_json(tmp_path: Path, laconic: Laconic) -> None:
    ran = laconic("report", "--pareto", artifact(tmp_path / "a"), "-o", tmp_path / "p.html", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert [p["name"] for p in told["points"]] == ["original", "a"]
    assert told["files"] == [str(tmp_path / f"p.{kind}") for kind in ("html", "md", "csv")]


# --- what is refused ---


def test_missing_results_say_which_command(tmp_path: Path, laconic: Laconic) -> None:
    a, b = artifact(tmp_path / "a", skip="eval"), artifact(tmp_path / "b", skip="bench")
    complaint = laconic("report", "--pareto", a, b, "-o", tmp_path / "p.html").complaint
    assert complaint == (
        f"results are missing; run laconic eval {a} --baseline {BASE} --text FILE; "
        f"laconic bench sparsity {b} --baseline {BASE} --measure models"
    )
    assert not (tmp_path / "p.html").exists()


def test_artifacts_of_different_models_are_refused(tmp_path: Path, laconic: Laconic) -> None:
    a, b = artifact(tmp_path / "a"), artifact(tmp_path / "b", base="models/other", sha="b")
    complaint = laconic("report", "--pareto", a, b, "-o", tmp_path / "p.html").complaint
    assert complaint == (
        f"these artifacts are of different models ({a} of {BASE}, {b} of models/other); report on one model at a time"
    )


def test_one_model_under_two_names_is_one(tmp_path: Path) -> None:
    same = [artifact(tmp_path / "a", base="models/base/"), artifact(tmp_path / "b", sha="c"), artifact(tmp_path / "c")]
    assert len(gather_points(same)[0]) == 4
    copied = [artifact(tmp_path / "d", base="hub/base"), artifact(tmp_path / "e", base="/mnt/base")]
    assert len(gather_points(copied)[0]) == 3, "the same weights by their fingerprint"


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"text": "other.txt"}, "differ in 'text' .*run 'laconic eval' with one value for all"),
        ({"windows": 9}, "differ in 'windows'"),
        ({"device_name": "a GPU"}, "differ in 'device_name' .*run 'laconic bench sparsity' with one value for all"),
        ({"prompt": 512}, "differ in 'prompt'"),
    ],
    ids=str,
)
def test_what_was_measured_otherwise_is_refused(tmp_path: Path, keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        gather_points([artifact(tmp_path / "a"), artifact(tmp_path / "b", **keys)])


def test_no_artifact_and_no_page(tmp_path: Path, laconic: Laconic) -> None:
    assert "is no artifact: it has no config.json" in laconic("report", "--pareto", tmp_path).complaint
    ran = laconic("report", "--pareto", artifact(tmp_path / "a"), "-o", tmp_path / "p.txt")
    assert "give" in ran.complaint
    broken = artifact(tmp_path / "b")
    (broken / "results" / "eval-t-32.json").write_text("{")
    assert "is not valid JSON" in laconic("report", "--pareto", broken).complaint


def _row(**keys: Any) -> dict[str, Any]:
    phase = {"tokens_per_second": 100.0, "speedup": 1.0}
    return {"name": "a", "gone": 0.5, "prefill": phase, "decode": phase} | keys


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"kl_mean": "low"}, "eval-t-32.json: kl_mean should be a valid number; omit that artifact, or delete "),
        ({"kl_mean": float("nan")}, "eval-t-32.json: kl_mean should be a finite number"),
        ({"file_bytes": 0}, "eval-t-32.json: file_bytes should be greater than 0"),
        ({"baseline_perplexity": None}, "eval-t-32.json: baseline_perplexity should be a valid number"),
        ({"device_name": None}, "bench-sparsity-cpu.json: device_name should be a valid string"),
        ({"models": 5}, "bench-sparsity-cpu.json: models should be a valid list"),
        ({"models": [_row(), _row(decode=None)]}, "bench-sparsity-cpu.json: models.1.decode should be"),
        ({"models": [_row(), _row(gone="half")]}, "bench-sparsity-cpu.json: models.1.gone should be a valid number"),
        (
            {"models": [_row(), _row(decode={"tokens_per_second": 1.0, "speedup": 0})]},
            "bench-sparsity-cpu.json: models.1.decode.speedup should be greater than 0",
        ),
        ({"models": [_row()]}, "results are missing; run laconic bench sparsity "),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_result_that_was_changed_is_told(
    laconic: Laconic, tmp_path: Path, keys: dict[str, Any], complaint: str
) -> None:
    good, bad = artifact(tmp_path / "good"), artifact(tmp_path / "bad", **keys)
    said = laconic("report", "--pareto", good, bad, "-o", tmp_path / "p.html").complaint
    assert complaint in said
    assert str(bad) in said
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"perplexity": "low"}, "eval-t-32.json: perplexity should be a valid number"),
        ({"models": [_row(), _row(decode=None)]}, "bench-sparsity-cpu.json: models.1.decode should be"),
    ],
    ids=["text", "speed"],
)
def test_a_page_of_a_result_that_was_changed_is_not_drawn(
    laconic: Laconic, tmp_path: Path, keys: dict[str, Any], complaint: str
) -> None:
    bad = artifact(tmp_path / "bad", **keys)
    assert complaint in laconic("report", bad, "-o", tmp_path / "p.html").complaint
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("flags", [["--pareto"], []], ids=["pareto", "page"])
@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("results/eval-t-32.json", b"[]", "results/eval-t-32.json holds no keys and values; delete it, measure again"),
        ("results/eval-t-32.json", b"\xff\xfe", "is not valid JSON; delete it and measure again"),
        ("recipe.yaml", b"[1", "recipe.yaml cannot be read; copy the artifact again, or compress again"),
        ("recipe.yaml", b"- 1", "recipe.yaml cannot be read; copy the artifact again, or compress again"),
        ("recipe.yaml", b"\xff\xfe", "recipe.yaml cannot be read; copy the artifact again, or compress again"),
        ("log.jsonl", b"{", "log.jsonl cannot be read; copy the artifact again, or compress again"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_file_of_an_artifact_that_is_broken_is_told(
    laconic: Laconic, tmp_path: Path, flags: list[str], file: str, content: bytes, complaint: str
) -> None:
    broken = artifact(tmp_path / "broken")
    (broken / file).write_bytes(content)
    assert complaint in laconic("report", *flags, broken, "-o", tmp_path / "p.html").complaint
