"""`laconic eval domains`: each kind of text as it is measured alone; intervals, tables and diagrams of results."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from artifacts import press, rtn
from commands import Laconic
from laconic import Artifact
from laconic.evaluation.domains import evaluate_domains
from laconic.evaluation.options import DomainOptions, TextOptions
from laconic.evaluation.text import evaluate_text
from tiny import make_text


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(llama, tmp_path_factory.mktemp("artifacts") / "w2", rtn("W2A16", group_size=32))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "other.txt"
    file.write_text(make_text(6000)[::-1])
    return file


def test_a_domain_is_measured_as_it_is_alone(artifact: Artifact, llama: Path, text: Path, other: Path) -> None:
    texts = {"letters": str(text), "backwards": str(other)}
    how = {"baseline": str(llama), "context_length": 32, "windows": 6}
    result = evaluate_domains(artifact.path, DomainOptions(domains=texts, **how))
    for row in result["domains"]:
        alone = evaluate_text(artifact.path, TextOptions(text=texts[row["domain"]], **how))
        for name, value in row.items():
            if name not in ("domain", "perplexity_ratio"):
                assert alone[name] == value, name
        low, high = row["perplexity_ratio_interval"]
        assert low <= row["perplexity_ratio"] <= high
    kl = {row["domain"]: row["kl_mean"] for row in result["domains"]}
    assert kl[result["worst"]] == max(kl.values())
    assert artifact.results["domains-letters+backwards-32-6"] == result


def test_intervals_hold_what_they_are_of(artifact: Artifact, llama: Path, text: Path) -> None:
    result = evaluate_text(
        artifact.path, TextOptions(baseline=str(llama), text=str(text), context_length=32, windows=12)
    )
    for name in ("perplexity", "baseline_perplexity", "kl_mean", "top1_agreement"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    low, high = result["perplexity_difference_interval"]
    assert low <= result["perplexity"] - result["baseline_perplexity"] <= high
    apart = sum(b - a for a, b in (result["perplexity_interval"], result["baseline_perplexity_interval"]))
    assert high - low < apart
    again = evaluate_text(
        artifact.path, TextOptions(baseline=str(llama), text=str(text), context_length=32, windows=12)
    )
    assert again["calibration"] == result["calibration"]
    assert again["perplexity_interval"] == result["perplexity_interval"]
    assert result["calibration"]["predictions"] == result["tokens"]


def test_the_command_the_picture_and_the_page(
    laconic: Laconic, artifact: Artifact, llama: Path, text: Path, other: Path, tmp_path: Path
) -> None:
    small = ("--context-length", "32", "--windows", "4", "--baseline", llama)
    drawn = tmp_path / "pictures" / "sure.svg"
    asked = (f"letters={text}", f"back wards={other}", "--reliability", drawn)
    ran = laconic("eval", "domains", artifact.path, *asked, *small)
    assert ran.code == 0, ran.err
    for word in ("letters", "back wards", "KL", "95% interval", "resamples of windows"):
        assert word in ran.out
    for name in ("sure-letters.svg", "sure-back_wards.svg"):
        told = [g.get("data-tooltip", "") for g in ElementTree.parse(drawn.with_name(name)).iter()]
        assert sum("predictions, confidence" in said for said in told) == 2 * 15
    ran = laconic("eval", artifact.path, "--text", text, "--reliability", drawn, *small)
    assert ran.code == 0, ran.err
    assert drawn.exists()
    assert "next token: ECE" in ran.out
    page = tmp_path / "page.html"
    ran = laconic("report", artifact.path, "-o", page)
    assert ran.code == 0, ran.err
    assert "back wards" in ran.out
    html = page.read_text()
    assert html.count('aria-label="Reliability, ') >= 3
    assert "back wards" in html


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["web"], "web is not NAME=FILE; write it as in web=c4.jsonl"),
        (["a=x.txt", "a=y.txt"], "the domain 'a' is named twice"),
        (["a=x.txt", "--text", "c4"], "No such option: --text"),
        (["a=nowhere.txt"], "no text file 'nowhere.txt'; check the path"),
        ([], "Missing argument 'NAME=FILE...'"),
    ],
    ids=lambda p: " ".join(p) if isinstance(p, list) else "",
)
def test_wrong_input_is_told_in_a_line(arguments: list[str], expected: str, laconic: Laconic, llama: Path) -> None:
    assert laconic("eval", "domains", llama, *arguments).complaint.startswith(expected)


def test_a_domain_of_another_text_leaves_the_first_result(artifact: Artifact, text: Path, other: Path) -> None:
    for file in (text, other, text):
        evaluate_domains(artifact.path, DomainOptions(domains={"again": str(file)}, context_length=32, windows=2))
    kept = {name: r["texts"] for name, r in artifact.results.items() if name.startswith("domains-again-")}
    assert kept == {"domains-again-32-2": {"again": str(text)}, "domains-again-32-2-2": {"again": str(other)}}


@pytest.mark.parametrize(("command", "option"), [("text", "--reliability"), ("long", "--heat-map")])
def test_a_picture_that_cannot_be_written_is_told_first(
    laconic: Laconic, llama: Path, tmp_path: Path, command: str, option: str
) -> None:
    (tmp_path / "folder.svg").mkdir()
    for name, said in (("a.png", "a name that ends in .svg"), ("folder.svg", "is a folder; choose another name")):
        assert laconic("eval", command, llama, option, tmp_path / name).complaint.endswith(said)
