"""`laconic eval long`: its result, its words, its page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from artifacts import press, rtn
from commands import Laconic
from laconic import Artifact
from laconic.evaluation.caches import parse_stage, title
from laconic.evaluation.long_context import evaluate_long
from laconic.evaluation.options import LongOptions
from laconic.evaluation.through_cache import PLAIN

KV = "{method: kivi, k_bits: 2, v_bits: 4, group_size: 16, residual_length: 16}"
NAME = "kivi k_bits 2 v_bits 4 group_size 16 residual_length 16"
SLUG = "kivi_k_bits_2_v_bits_4_group_size_16_residual_length_16"
SMALL = ("--lengths", "180,240", "--depths", 2, "--trials", 1, "--windows", 1)


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(llama, tmp_path_factory.mktemp("artifacts") / "w8", rtn("W8A16"))


def test_everything_is_measured_and_kept(artifact: Artifact, text: Path) -> None:
    result = evaluate_long(
        artifact.path, LongOptions(kv=[KV], text=str(text), lengths=[240, 180], depths=2, trials=1, windows=2)
    )
    assert result["caches"] == [PLAIN, NAME]
    for part, rows in (("perplexity", 2), ("needle", 4), ("memory", 2), ("speed", 2)):
        assert [len(result[part][name]) for name in result["caches"]] == [rows if part != "perplexity" else 1] * 2
    assert result["perplexity"][PLAIN][-1]["kl_mean"] == 0 < result["perplexity"][NAME][-1]["kl_mean"]
    assert result["memory"][NAME][-1]["request_bytes"] < result["memory"][PLAIN][-1]["request_bytes"]
    assert (result["lengths"], result["seed"], result["windows"]) == ([180, 240], 0, 2)
    assert result["command"]
    assert "transformers" in result["versions"]
    assert artifact.results[f"long-calibration-240-needle-{SLUG}"] == json.loads(json.dumps(result))


@pytest.mark.parametrize("method", ["kivi", "kvquant"])
def test_a_cache_of_the_artifacts_own_is_measured_too(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    own = press(llama, tmp_path / "own", {"method": method}, text=text, samples=4, length=64)
    result = evaluate_long(
        own.path,
        LongOptions(
            kv=[KV], text=str(text), lengths=[200], windows=1, parts=["perplexity", "memory", "speed"], chunk=8
        ),
    )
    assert result["caches"] == [PLAIN, f"artifact ({method})", NAME]
    assert result["perplexity"][f"artifact ({method})"][-1]["kl_mean"] > 0
    assert result["memory"][f"artifact ({method})"][-1]["bits"] < 16
    assert list(own.results) == ["compress", f"long-calibration-200-perplexity+memory+speed-{SLUG}"]


def test_the_command_says_it_and_the_report_shows_it(
    laconic: Laconic, artifact: Artifact, text: Path, tmp_path: Path
) -> None:
    asked = ("--kv", KV, "--text", text, "--heat-map", tmp_path / "map.svg")
    ran = laconic("eval", "long", artifact.path, *asked, *SMALL)
    assert ran.code == 0, ran.err
    for word in ("bits/number", "needles at", "16 bit", "0-240", "tokens/s at"):
        assert word in ran.out
    drawn = ElementTree.parse(tmp_path / "map.svg").getroot()
    # A background, and of two caches two lengths at two depths.
    assert sum(e.tag.endswith("rect") for e in drawn.iter()) == 1 + 2 * 2 * 2
    page = tmp_path / "page.html"
    assert laconic("report", artifact.path, "-o", page).code == 0
    html = page.read_text()
    assert NAME in html
    assert html.count('aria-label="Needles found, ') == 2
    assert html.count('<svg class="chart"') > 4
    assert "Perplexity by position" in html


def test_a_part_alone(laconic: Laconic, llama: Path) -> None:
    # Bytes need no text.
    ran = laconic("eval", "long", llama, "--kv", KV, "--measure", "memory", "--lengths", "64", "--json")
    told = json.loads(ran.out)
    assert told["memory"][NAME][0]["length"] == 64
    assert not {"perplexity", "needle", "speed"} & set(told)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lengths", "many"], "--lengths many is no list of numbers; write it as in "),
        (["--lengths", "512"], "--lengths 512 is not between 2 and the model's context of 256"),
        (["--depths", "0"], "--depths 0 is less than 1"),
        (
            ["--lengths", "128", "--text", "TEXT"],
            "--lengths 128 leaves no room for hay; the needle ",
        ),
        (["--measure", "taste"], "--measure taste is not one of perplexity, needle, memory, speed"),
        (["--measure", ","], "--measure names nothing; name some of perplexity, needle, memory, speed"),
        (["--prompt", "riddle"], "--prompt riddle is not one of needle, comment, passkey"),
        (["--kv", "{method: quip}"], "--kv quip: no cache method 'quip'; choose one of kivi, "),
        (["--kv", "{"], "--kv { is not YAML: "),
        (["--kv", "kivi"], "--kv kivi names no method; write it as in --kv '{method: kivi, "),
        (["--kv", "{method: kivi, bits: 2}"], "--kv kivi bits 2: unknown key 'bits'; did you mean 'v_bits'?"),
        (
            ["--kv", "{method: kivi, k_bits: 9}"],
            "--kv kivi k_bits 9: k_bits should be less than or equal to 8, not 9",
        ),
        (
            ["--kv", "{method: kivi, group_size: 12}"],
            "--kv kivi group_size 12: group_size 12 does not divide the 16 channels",
        ),
        (
            ["--kv", "{method: kivi, budget_bits: 3}"],
            "--kv kivi budget_bits 3: kivi is calibrated; ",
        ),
        (["--kv", "{method: gptq}"], "--kv gptq: no cache method 'gptq'; choose one of kivi, "),
        (["--baseline", "m"], "No such option: --baseline"),
        (
            ["--measure", "memory", "--heat-map", "m.svg"],
            "--heat-map draws needles; leave out --measure, or name needle in it",
        ),
        (["--measure", "longbench"], "LongBench has a command of its own: laconic eval longbench "),
    ],
    ids=str,
)
def test_a_wrong_command(laconic: Laconic, llama: Path, text: Path, arguments: list[str], expected: str) -> None:
    given = [text if a == "TEXT" else a for a in arguments]
    said = laconic("eval", "long", llama, *given).complaint
    assert said.startswith(expected)
    # LongBench is no part of this command, so it is offered only as a command of its own.
    assert "longbench" not in said.replace("laconic eval longbench", "")


def test_a_text_that_is_too_short(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too little")
    said = laconic("eval", "long", llama, "--text", short, "--lengths", 128).complaint
    assert said.startswith("the evaluation text has ")
    assert said.endswith(
        "less than one window of 128; give more text or a shorter context (--context-length; "
        "--lengths of the long suite)"
    )


def test_a_stage_is_told_in_a_few_words() -> None:
    assert title(parse_stage(KV)) == NAME
    assert parse_stage('{"method": "kivi", "k_bits": 2}') == {"method": "kivi", "k_bits": 2}
