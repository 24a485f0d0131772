"""LongBench by lm-eval's own tasks: the Hub is played by rows of our own words in its columns, and scores are those of
plain `generate` and of metrics written anew."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import laconic as package
from artifacts import original, press, rtn
from commands import Laconic
from laconic.checkpoint.source import load_tokenizer
from laconic.evaluation.long_context import evaluate_long
from laconic.evaluation.options import LongBenchOptions, LongOptions, TaskOptions
from laconic.evaluation.tasks import evaluate_tasks
from laconic.evaluation.through_cache import PLAIN, continue_greedily, plain_cache
from laconic.report.long_table import long_caption
from tiny import make_model, make_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'laconic[eval]'"
)

Row = dict[str, Any]
tokenizer_of = cache(load_tokenizer)
KV = "{method: kivi, k_bits: 1, v_bits: 1, group_size: 16, residual_length: 0}"
NAME = "kivi k_bits 1 v_bits 1 group_size 16 residual_length 0"
METRICS = "lm_eval.tasks.longbench.metrics"
TEXT = make_text(6000)
# Table 1 of arXiv 2308.14508.
ALL = {
    "single": ["narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"],
    "multi": ["hotpotqa", "2wikimqa", "musique", "dureader"],
    "summarization": ["gov_report", "qmsum", "multi_news", "vcsum"],
    "fewshot": ["trec", "triviaqa", "samsum", "lsht"],
    "synthetic": ["passage_count", "passage_retrieval_en", "passage_retrieval_zh"],
    "code": ["lcc", "repobench-p"],
}


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval reads its metrics anew; packages that only metrics which are not looked at here want may be missing."""
    for name, part in (("jieba", "cut"), ("fuzzywuzzy", "fuzz"), ("rouge", "Rouge")):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, stand_in := ModuleType(name))
            setattr(stand_in, part, None)
    sys.modules.pop(METRICS, None)
    yield
    sys.modules.pop(METRICS, None)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "roomy", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def model(roomy: Path) -> PreTrainedModel:
    return original(roomy, torch.float32)


def document(i: int, answers: Sequence[str], classes: Sequence[str] | None = None) -> Row:
    """A row in the columns that the Hub has."""
    return {
        "question": f"What is said of {TEXT[50 * i :][:8]}?",
        "context": TEXT[300 * i :][: 120 + 40 * i],
        "answers": list(answers),
        "length": 40,
        "dataset": "ours",
        "language": "en",
        "all_classes": classes,
        "_id": str(i),
    }


def play_hub(patched: pytest.MonkeyPatch, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Have `datasets` find these rows by LongBench's names; the names that are asked for are noted."""
    import datasets

    asked = []

    def hub(path: str, name: str, **_: Any) -> Any:
        assert path.endswith("/LongBench")
        asked.append(name)
        return datasets.DatasetDict(test=datasets.Dataset.from_list(list(rows[name])))

    patched.setattr(datasets, "load_dataset", hub)
    return asked


def write(folder: Path, rows: Mapping[str, Sequence[Row]]) -> Path:
    """The same as local files, with the question spelled as LongBench's own files have it."""
    folder.mkdir(exist_ok=True)
    for name, some in rows.items():
        spelled = [{("input" if k == "question" else k): v for k, v in row.items()} for row in some]
        (folder / f"longbench_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spelled))
    return folder


def question_of(row: Row) -> str:
    """The prompt of HotpotQA: what is to be done, the passages, the same again, the question."""
    told = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    passages = f"The following are given passages.\n{row['context']}"
    return f"{told}\n\n{passages}\n\n{told}\n\nQuestion: {row['question']}\nAnswer:"


def named(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """The cache under the name by which this transformers passes it."""
    return {"cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache}


Said = Callable[[Tensor], Tensor]


def answer(folder: Path, prompt: str, say: Said) -> str:
    """What is said after a prompt, up to the end of the text."""
    tokenizer = tokenizer_of(folder)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    said = say(ids)[0].tolist()
    end = said.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in said else len(said)
    return str(tokenizer.decode(said[:end], skip_special_tokens=True))


def f1(said: str, right: Sequence[str]) -> float:
    """Words in common, without case, punctuation and articles; the best of the right answers (SQuAD's F1)."""

    def words(text: str) -> Counter[str]:
        bare = "".join(c for c in text.lower() if c not in string.punctuation)
        return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())

    best = 0.0
    for other in right:
        ours, theirs = words(said), words(other)
        if common := (ours & theirs).total():
            best = max(best, 2 * common / (ours.total() + theirs.total()))
    return best


def generating(model: PreTrainedModel, *, quantized: bool) -> Said:
    """32 tokens by `generate`, through the cache of KV or through transformers' own."""

    @cache
    def say(prompt: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([prompt])
        options = {"k_bits": 1, "v_bits": 1, "group_size": 16, "residual_length": 0}
        kv = package.kv_cache(model, "kivi", **options) if quantized else plain_cache(model)
        return model.generate(ids, **named(model, kv), max_new_tokens=32, do_sample=False)[:, ids.shape[1] :]

    return lambda ids: say(tuple(ids[0].tolist()))


def answered(folder: Path, say: Said, count: int = 5) -> list[Row]:
    """Documents whose right answers are a part of what is said to them, beside a word that is not."""
    rows = []
    for i in range(count):
        said = answer(folder, question_of(document(i, [])), say).split()
        rows.append(document(i, [" ".join([*said[: 1 + i], "else"]), "nothing of it"]))
    return rows


def test_a_task_is_scored_as_plain_generate_and_f1_have_it(
    roomy: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quantized, plain = (generating(model, quantized=q) for q in (True, False))
    rows = answered(roomy, quantized)
    asked = play_hub(monkeypatch, {"hotpotqa": rows})
    scores = {}
    for kv, say in ((KV, quantized), (None, plain)):
        # One by one: padding would move the groups of tokens that are stored together.
        how: dict[str, Any] = {"kv": [kv] if kv else [], "batch_size": 1, "dtype": "float32", "quiet": True}
        result = evaluate_tasks(roomy, TaskOptions(tasks=["longbench_hotpotqa"], **how))
        found = {row["metric"]: row for row in result["rows"]}
        scores[kv] = sum(f1(answer(roomy, question_of(r), say), r["answers"]) for r in rows) / len(rows)
        assert {m: row["value"] for m, row in found.items()} == pytest.approx(
            {"score": scores[kv], "qa_f1_score": scores[kv]}
        )
        assert [(row["main"], row["documents"]) for row in found.values()] == [(True, 5), (False, 5)]
        assert (result["cache"], result["cut"]) == (NAME if kv else None, {})
        local = evaluate_tasks(
            roomy, TaskOptions(tasks=["longbench_hotpotqa"], data=write(tmp_path / "local", {"hotpotqa": rows}), **how)
        )
        assert local["rows"] == result["rows"]
    # Or it would not show which cache answered.
    assert scores[None] < scores[KV] < 1
    assert set(asked) == {"hotpotqa"}


def test_an_artifacts_own_cache_answers(roomy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {"method": "kivi", "k_bits": 1, "v_bits": 1, "group_size": 16, "residual_length": 0}
    artifact = press(roomy, tmp_path / "own", rtn("W8A16"), own)
    opened = package.load(artifact.path, dtype=torch.float32)
    rows = answered(roomy, generating(opened, quantized=True))
    play_hub(monkeypatch, {"hotpotqa": rows})
    result = evaluate_tasks(
        artifact.path, TaskOptions(tasks=["longbench_hotpotqa"], batch_size=1, dtype="float32", quiet=True)
    )
    said = [answer(roomy, question_of(r), generating(opened, quantized=True)) for r in rows]
    expected = sum(f1(s, r["answers"]) for s, r in zip(said, rows, strict=True)) / len(rows)
    assert result["cache"] == "kivi"
    assert result["rows"][0]["value"] == pytest.approx(expected)
    assert artifact.results["tasks-longbench_hotpotqa"] == result


def test_the_suites_longbench_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    from laconic.evaluation.harness import open_hub

    names = [name for some in ALL.values() for name in some]
    asked = play_hub(monkeypatch, {name: [document(0, ["yes"], ["yes", "no"])] for name in names})
    opened = open_hub(["longbench"])
    loaded = opened.manager.load(opened.tasks)
    tasks = loaded["tasks"]
    assert sorted(tasks) == sorted(f"longbench_{name}" for name in names)
    assert set(asked) == set(names)
    for group, some in ALL.items():
        members = loaded["groups"][f"longbench_{group}"].get_all_tasks()
        assert sorted(task.task_name for task in members) == sorted(f"longbench_{name}" for name in some)
    assert all("score" in task.aggregation() for task in tasks.values())


def test_a_group_is_the_mean_of_its_tasks(
    roomy: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three kinds of task, of so many documents each that the mean over documents would be another number."""
    rows = answered(roomy, generating(model, quantized=False), 5)
    classes = [f"{letter}{other}" for letter in "abc" for other in "abc"]
    folder = write(
        tmp_path / "data",
        {
            "hotpotqa": rows,
            "hotpotqa_e": rows,
            "passage_count": [document(i, [str(i)]) for i in range(2)],
            "trec": [document(i, [classes[i]], classes) for i in range(3)],
        },
    )
    result = evaluate_tasks(
        roomy, TaskOptions(tasks=["longbench"], data=folder, baseline=str(roomy), kv=[KV], dtype="float32", quiet=True)
    )
    (group,) = result["rows"]
    scores = {r["task"]: r for r in result["subtasks"] if r["metric"] == "score"}
    # LongBench-E is not of it.
    assert list(scores) == ["longbench_hotpotqa", "longbench_passage_count", "longbench_trec"]
    for key in ("value", "baseline"):
        assert group[key] == pytest.approx(sum(r[key] for r in scores.values()) / 3)
    assert (group["metric"], group["tasks"], group["documents"], group["main"]) == ("score", 3, 10, True)
    assert group["baseline"] > group["value"] >= 0
    assert group["difference_stderr"] > 0
    # Of the original, no cache but transformers' own is used.
    own = [f1(answer(roomy, question_of(r), generating(model, quantized=False)), r["answers"]) for r in rows]
    assert scores["longbench_hotpotqa"]["baseline"] == pytest.approx(sum(own) / 5)


def test_a_long_prompt_loses_its_middle_and_no_other_task_does(roomy: Path, tmp_path: Path, laconic: Laconic) -> None:
    from lm_eval.api.instance import Instance

    from laconic.evaluation.lm import OpenedLM

    lm = OpenedLM(original(roomy), load_tokenizer(roomy), context_length=400, batch_size=1)
    prompt = question_of(document(4, []))

    def asked(task: str) -> Any:
        return Instance("generate_until", {}, (prompt, {}), 0, (task, 0, 1))

    cut = lm._cut_middle(asked("longbench_hotpotqa"), 201).args[0]
    # A BOS leads, which is a token too.
    assert cut == prompt[:99] + prompt[-100:]
    assert lm._cut_middle(asked("gsm8k"), 201).args[0] == prompt
    folder = write(tmp_path / "data", {"hotpotqa": [document(i, ["yes"]) for i in range(5)]})
    # Prompts are the longer the later; with 32 tokens of an answer, the third just fits.
    context = len(load_tokenizer(roomy)(question_of(document(2, []))).input_ids) + 32
    told = laconic("eval", "tasks", roomy, "longbench", "--data", folder, "--context-length", context)
    assert told.code == 0, told.err
    expected = f"(LongBench: middle) to fit {context} tokens: longbench 2 of 5"
    assert expected in " ".join(told.out.split())


def test_the_long_suite_asks_through_every_cache(roomy: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    def through(*, quantized: bool) -> Said:
        options = {"k_bits": 1, "v_bits": 1, "group_size": 16, "residual_length": 0}

        def say(ids: Tensor) -> Tensor:
            cache = package.kv_cache(model, "kivi", **options) if quantized else plain_cache(model)
            return continue_greedily(model, ids, cache, chunk=48, tokens=32)

        return say

    rows = answered(roomy, through(quantized=True))
    folder = write(tmp_path / "data", {"hotpotqa": rows, "trec": [document(0, ["a"], ["a", "b"])]})
    how: dict[str, Any] = {"kv": [KV], "parts": ["longbench"], "batch_size": 1, "dtype": "float32", "chunk": 48}
    longbench = LongBenchOptions(tasks=["longbench_hotpotqa"], data=folder, limit=4)
    result = evaluate_long(roomy, LongOptions(longbench=longbench, **how))
    told = result["longbench"]
    assert list(told["rows"]) == result["caches"] == [PLAIN, NAME]
    for name, quantized in ((PLAIN, False), (NAME, True)):
        row = told["rows"][name][0]
        said = [answer(roomy, question_of(r), through(quantized=quantized)) for r in rows[:4]]
        expected = sum(f1(s, r["answers"]) for s, r in zip(said, rows[:4], strict=True)) / 4
        assert (row["task"], row["metric"], row["documents"]) == ("longbench_hotpotqa", "score", 4)
        assert row["value"] == pytest.approx(expected)
    ours, plain = told["rows"][NAME][0], told["rows"][PLAIN][0]
    assert ours["difference"] == pytest.approx(ours["value"] - plain["value"])
    assert ours["value"] > plain["value"]
    assert (told["context_length"], told["limit"], told["cut"]) == (2048, 4, {})
    assert "lm-eval" in result["versions"]


def test_the_long_suite_shows_it_on_the_terminal_and_the_page(roomy: Path, laconic: Laconic, tmp_path: Path) -> None:
    artifact = press(roomy, tmp_path / "w8", rtn("W8A16"))
    rows = [document(i, ["yes"]) for i in range(2)]
    folder = write(tmp_path / "data", {"hotpotqa": rows, "passage_count": rows})
    asked = ("--data", folder, "--kv", KV, "--limit", 1)
    ran = laconic("eval", "longbench", artifact.path, *asked, "--context-length", 430)
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    for words in ("longbench (2 tasks)", f"LongBench's documents from {folder}", "of at most 430 tokens", "±"):
        assert words in said
    assert f"long-wikitext2-430-longbench-1-{NAME.replace(' ', '_')}" in artifact.results
    page = tmp_path / "page.html"
    assert laconic("report", artifact.path, "-o", page).code == 0
    assert "longbench_passage_count" in page.read_text()


def test_offline_it_says_that_it_was_not_run_and_why(laconic: Laconic, llama: Path) -> None:
    result = evaluate_long(llama, LongOptions(lengths=[64], parts=["memory", "longbench"]))
    assert result["longbench"]["not_run"].startswith("the task 'longbench' could not be opened (Couldn't reach '")
    assert result["memory"]
    said = " ".join(long_caption(result).split())
    assert "LongBench was not run: the task 'longbench' could not be opened (Couldn't reach" in said
    assert said.endswith("go online, or give local files with --data DIR")
    alone = laconic("eval", "longbench", llama, "--context-length", "64").complaint
    assert alone.startswith("the task 'longbench' could not be opened (Couldn't reach '")


def test_by_default_it_says_that_it_has_to_be_named(laconic: Laconic, llama: Path, text: Path) -> None:
    small = ("--lengths", 180, "--depths", 1, "--trials", 1, "--windows", 1, "--text", text)
    said = " ".join(laconic("eval", "long", llama, *small).out.split())
    assert said.endswith("LongBench was not run: it has a command of its own, laconic eval longbench")


@pytest.mark.parametrize("local", [False, True])
def test_missing_packages_are_named(
    local: bool, laconic: Laconic, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    data = ("--data", write(tmp_path / "data", {"hotpotqa": [document(0, ["yes"])]})) if local else ()
    said = laconic("eval", "tasks", llama, "longbench_hotpotqa", *data).complaint
    assert said == (
        "the task 'longbench_hotpotqa' needs packages that are not installed; pip install 'laconic[longbench]'"
    )


DATA = ("--data", "DATA")


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"question": None}, DATA, "FILE, line 1, needs 'question' (or 'input'), a text"),
        ({"answers": []}, DATA, "FILE, line 1, needs 'answers', of one text or more"),
        ({"answers": "yes"}, DATA, "FILE, line 1, needs 'answers', a list"),
        ({"context": 5}, DATA, "FILE, line 1, needs 'context', a text"),
        ({}, ("mmlu", *DATA), "laconic eval longbench measures LongBench's tasks only (longbench, "),
        (
            {},
            (*DATA, "--context-length", "100000"),
            "--context-length 100000 is not between 2 and the model's context of",
        ),
        ({}, ("longbench_hotpot", *DATA), "no task 'longbench_hotpot' over local files; did you mean "),
        ({}, (*DATA, "--limit", "0"), "--limit 0 is less than 1"),
        (
            {},
            (*DATA, "--context-length", "33"),
            "answers of 'longbench_hotpotqa' take 32 tokens, and the context has 33",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_a_line(
    row: Row, asked: Sequence[str], expected: str, laconic: Laconic, llama: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "data", {"hotpotqa": [document(0, ["yes"]) | row]})
    said = laconic("eval", "longbench", llama, *(folder if a == "DATA" else a for a in asked)).complaint
    assert said.startswith(expected.replace("FILE", str(folder / "longbench_hotpotqa.jsonl")))
