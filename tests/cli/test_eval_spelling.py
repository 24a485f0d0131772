"""`laconic eval` without the name of a command: what still runs, as what, and what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts import press, rtn
from commands import Laconic

SHORT = ("--context-length", "32", "--windows", "2")


def test_a_model_alone_is_measured_on_a_text(laconic: Laconic, llama: Path, text: Path) -> None:
    plain, named = (laconic("eval", *more, llama, "--text", text, *SHORT, "--json") for more in ((), ("text",)))
    assert (plain.code, plain.err) == (named.code, named.err) == (0, "")
    assert json.loads(plain.out)["perplexity"] == json.loads(named.out)["perplexity"]


def test_an_old_spelling_runs_with_a_hint_and_leaves_the_new_one(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    artifact = press(llama, tmp_path / "an artifact", rtn("W8A16"))
    kv = "{method: kivi, group_size: 16}"
    ran = laconic("eval", artifact.path, "--suite", "long", "--measure", "memory", "--lengths=64", "--kv", kv)
    new = f"laconic eval long '{artifact.path}' --measure memory --lengths 64 --kv '{kv}'"
    assert (ran.code, ran.err) == (0, f"hint: this is now: {new}\n")
    (result,) = (result for name, result in artifact.results.items() if name != "compress")
    assert result["command"] == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m --domain a=x --windows 2 --domain b=y", "domains m a=x b=y --windows 2"),
        ("m --tasks piqa,boolq --tasks-data d --limit 3", "tasks m piqa,boolq --data d --limit 3"),
        ("--baseline b m --suite standard", "tasks m standard --baseline b"),
        ("m --suite long --measure longbench --lengths 64", "longbench m --context-length 64"),
        ("m --suite long --measure longbench --tasks longbench_trec", "longbench m longbench_trec"),
    ],
)
def test_old_spellings_are_these_now(laconic: Laconic, old: str, new: str) -> None:
    hint, complaint = laconic("eval", *old.split()).err.splitlines()
    assert hint == f"hint: this is now: laconic eval {new}"
    # The model is none.
    assert complaint.startswith(("laconic: no model folder 'm'", "laconic: no folder 'd'"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("m --domain a=x --tasks piqa", "--domain, --tasks and --suite are commands of their own; run "),
        ("m --suite standard --tasks piqa", "--domain, --tasks and --suite are commands of their own; run "),
        ("m --suite long --tasks piqa", "--domain, --tasks and --suite are commands of their own; run "),
        ("m --suite short", "--suite short is not known; there are 'laconic eval long' and 'laconic eval tasks'"),
        ("m --lengths 64", "--lengths is an option of 'laconic eval long'; see laconic eval long --help"),
        ("m --limit 3", "--limit is an option of 'laconic eval tasks'; see laconic eval tasks --help"),
        (
            "m --suite long --measure memory,longbench",
            "LongBench has a command of its own; run 'laconic eval longbench m' with its options, and 'laconic eval "
            "long m --measure memory'",
        ),
        ("taks m piqa", "No such command 'taks'. Did you mean 'tasks'?"),
        ("long m --measure longbench", "LongBench has a command of its own: laconic eval longbench m"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(laconic: Laconic, arguments: str, expected: str) -> None:
    assert laconic("eval", *arguments.split()).complaint.startswith(expected)
