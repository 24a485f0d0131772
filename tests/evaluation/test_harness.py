"""Standard tasks through lm-eval, against log-likelihoods and generations of plain transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import laconic as package
from artifacts import original, press, rtn
from commands import Laconic
from laconic import Artifact
from laconic.checkpoint.source import load_tokenizer
from laconic.evaluation.options import TaskOptions
from laconic.evaluation.tasks import evaluate_tasks
from laconic.kv.attach import make_cache
from laconic.kv.cache import KvCache
from tiny import make_model, make_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'laconic[eval]'"
)

Row = dict[str, Any]
tokenizer_of = cache(load_tokenizer)
LETTERS = make_text(4000).replace(" ", "")
WORDS = [LETTERS[9 * i : 9 * i + 2 + i % 7] for i in range(len(LETTERS) // 9)]


def phrase(first: int, words: int) -> str:
    return " ".join(WORDS[first : first + words])


def multiple_choice(rows: int, choices: int = 4, seed: int = 0) -> list[Row]:
    """Questions without meaning; choices are of 6 or 7 letters, so that acc and acc_norm differ, yet length alone does
    not decide."""
    chosen = np.random.default_rng(seed).integers(0, choices, rows)
    return [
        {
            "question": phrase(9 * i, 4),
            "choices": [LETTERS[40 * i + 9 * c :][: 6 + (i + c) % 2] for c in range(choices)],
            "label": int(chosen[i]),
        }
        for i in range(rows)
    ]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for prompts of a few examples."""
    return make_model(tmp_path_factory.mktemp("models") / "roomy", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def artifact(roomy: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(roomy, tmp_path_factory.mktemp("artifacts") / "w2", rtn("W2A16", group_size=32))


@pytest.fixture
def models(artifact: Artifact, roomy: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The artifact's and the original, in float32."""
    return package.load(artifact.path, dtype=torch.float32), original(roomy, torch.float32)


def measure(artifact: Artifact, roomy: Path, data: Path, *tasks: str, **how: Any) -> dict[tuple[str, str], Row]:
    """Rows by task and metric, of the artifact beside its original, in float32."""
    result = evaluate_tasks(
        artifact.path, TaskOptions(baseline=str(roomy), tasks=tasks, data=data, dtype="float32", quiet=True, **how)
    )
    return {(row["task"], row["metric"]): row for row in result["rows"]}


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, and whether it is the model's own first choice all along; BOS leads."""
    tokenizer = tokenizer_of(folder)
    ids = torch.tensor(tokenizer(context + continuation).input_ids)
    start = len(tokenizer(context).input_ids)
    logp = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)[start - 1 :]
    target = ids[start:]
    return float(logp.gather(1, target[:, None]).sum()), bool((logp.argmax(-1) == target).all())


def expect(row: Row, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """A row says what numpy says of the documents' scores."""
    a, b = np.array(ours, float), np.array(theirs, float)
    error = [x.std(ddof=1) / math.sqrt(len(x)) for x in (a, b, a - b)]
    assert [row["value"], row["baseline"], row["difference"]] == pytest.approx([a.mean(), b.mean(), (a - b).mean()])
    assert [row["stderr"], row["baseline_stderr"], row["difference_stderr"]] == pytest.approx(error)
    assert row["retention"] == pytest.approx(a.mean() / b.mean())
    assert row["documents"] == len(a)


def picked(
    model: PreTrainedModel, folder: Path, prompts: Sequence[tuple[str, list[str], int]]
) -> tuple[list[bool], list[bool]]:
    """For each prompt, choices and label, whether the likeliest choice is the right one; and the likeliest a letter."""
    right, right_by_length = [], []
    for prompt, choices, label in prompts:
        scores = np.array([log_likelihood(model, folder, prompt, f" {c}")[0] for c in choices])
        right.append(int(scores.argmax()) == label)
        right_by_length.append(int((scores / list(map(len, choices))).argmax()) == label)
    return right, right_by_length


def test_arc_is_what_transformers_makes_of_it(
    artifact: Artifact, roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    rows = multiple_choice(40)
    write(tmp_path / "arc_easy.jsonl", rows)
    found = measure(artifact, roomy, tmp_path, "arc_easy")
    prompts = [(f"Question: {r['question']}\nAnswer:", r["choices"], r["label"]) for r in rows]
    for metric, ours, theirs in zip(("acc", "acc_norm"), *(picked(m, roomy, prompts) for m in models), strict=True):
        assert ours != theirs  # or the pairing would not show
        expect(found["arc_easy", metric], ours, theirs)
    assert [row["main"] for row in found.values()] == [False, True]
    assert len({row["value"] for row in found.values()}) == 2


def test_hellaswag_is_prompted_as_lm_eval_does(
    artifact: Artifact, roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    rows = [
        {
            "ctx": f"Making {phrase(9 * i, 1)}: A cook is busy. {phrase(9 * i + 1, 2)}",
            "endings": r["choices"],
            "label": r["label"],
        }
        for i, r in enumerate(multiple_choice(16, seed=1))
    ]
    write(tmp_path / "hellaswag.jsonl", rows)
    row = measure(artifact, roomy, tmp_path, "hellaswag")["hellaswag", "acc_norm"]
    prompts = [
        (f"Making {phrase(9 * i, 1)}: A cook is busy. {phrase(9 * i + 1, 2).capitalize()}", r["endings"], r["label"])
        for i, r in enumerate(rows)
    ]
    expect(row, *(picked(m, roomy, prompts)[1] for m in models))


def test_winogrande_weighs_the_same_end_after_two_beginnings(
    artifact: Artifact, roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    rows = multiple_choice(16, choices=2, seed=2)
    for r in rows:
        r["question"] += " _ came late."
    write(tmp_path / "winogrande.jsonl", rows)
    row = measure(artifact, roomy, tmp_path, "winogrande")["winogrande", "acc"]

    def right(model: PreTrainedModel) -> list[bool]:
        scores = [
            [log_likelihood(model, roomy, r["question"].partition("_")[0] + c, " came late.")[0] for c in r["choices"]]
            for r in rows
        ]
        return [int(np.argmax(s)) == r["label"] for s, r in zip(scores, rows, strict=True)]

    expect(row, *map(right, models))


def test_lambada_is_what_transformers_makes_of_it(
    artifact: Artifact, roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    texts = [*(phrase(7 * i, 4) for i in range(10)), *foreseen(models[1], roomy, 2)]
    write(tmp_path / "lambada.jsonl", [{"text": text} for text in texts])
    found = measure(artifact, roomy, tmp_path, "lambada", batch_size=5)
    scored = []
    for model in models:
        pairs = [text.rpartition(" ") for text in texts]
        scored.append([log_likelihood(model, roomy, context, f" {word}") for context, _, word in pairs])
    (ours, ours_right), (theirs, theirs_right) = (zip(*s, strict=True) for s in scored)
    assert 0 < sum(theirs_right) < len(texts)
    expect(found["lambada_openai", "acc"], ours_right, theirs_right)
    row = found["lambada_openai", "perplexity"]
    a, b = (math.exp(-np.mean(ll)) for ll in (ours, theirs))
    assert [row["value"], row["baseline"], row["retention"]] == pytest.approx([a, b, b / a], rel=1e-4)
    assert not row["higher_is_better"]
    assert not row["main"]
    # The delta method, written out: the derivative of exp(-x) times the error of x.
    error = (a * np.array(ours) - b * np.array(theirs)).std(ddof=1) / math.sqrt(len(texts))
    assert row["difference_stderr"] == pytest.approx(error, rel=1e-4)


def foreseen(model: PreTrainedModel, folder: Path, count: int) -> list[str]:
    """Texts whose last word, of one letter, is what the model goes on with."""
    texts = (context + continued(model, folder, context, 2) for context in WORDS)
    return list(islice((t for t in texts if re.fullmatch(r"\w+ \S", t)), count))


def continued(model: PreTrainedModel, folder: Path, prompt: str, tokens: int) -> str:
    """What the model says next, by transformers."""
    tokenizer = tokenizer_of(folder)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_group_takes_its_tasks_together(
    artifact: Artifact, roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    sizes = {"blimp_adjunct_island": 6, "blimp_inchoative": 14}
    right: list[list[np.ndarray]] = [[], []]
    for name, size in sizes.items():
        pairs = [{"sentence_good": phrase(5 * i + size, 3), "sentence_bad": phrase(5 * i, 3)} for i in range(size)]
        write(tmp_path / f"{name}.jsonl", pairs)
        for found, model in zip(right, models, strict=True):
            good, bad = (
                [log_likelihood(model, roomy, "", f" {p[side]}")[0] for p in pairs]
                for side in ("sentence_good", "sentence_bad")
            )
            found.append(np.array(good) > np.array(bad))
    result = evaluate_tasks(
        artifact.path, TaskOptions(baseline=str(roomy), tasks=["blimp"], data=tmp_path, dtype="float32", quiet=True)
    )
    (row,) = result["rows"]
    assert (row["task"], row["tasks"], row["documents"]) == ("blimp", 2, 20)
    # Each task counts the same, as in lm-eval's own group.
    ours, theirs = ([x.mean() for x in tasks] for tasks in right)
    assert (row["value"], row["baseline"]) == pytest.approx((np.mean(ours), np.mean(theirs)))
    errors = [(a * 1.0 - b).std(ddof=1) / math.sqrt(len(a)) for a, b in zip(*right, strict=True)]
    assert row["difference_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert {r["task"]: r["value"] for r in result["subtasks"]} == pytest.approx(dict(zip(sizes, ours, strict=True)))
    assert result["mean_retention"] == row["retention"]


def test_gsm8k_reads_the_number_that_the_model_writes(
    roomy: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    example = {"question": "How many?", "answer": "Two and two. #### 4"}
    write(tmp_path / "gsm8k_train.jsonl", [example])
    rows = []
    for i in range(4):
        prompt = f"Question: {example['question']}\nAnswer: {example['answer']}\n\nQuestion: {phrase(i, 3)}\nAnswer:"
        said = continued(models[1], roomy, prompt, 256)
        number = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", said)[-1]
        rows.append({"question": phrase(i, 3), "answer": f"#### {number if i else number + '1'}"})
    write(tmp_path / "gsm8k_test.jsonl", rows)
    result = evaluate_tasks(roomy, TaskOptions(tasks=["gsm8k"], data=tmp_path, fewshot=1, dtype="float32", quiet=True))
    values = {row["metric"]: (row["value"], row["main"]) for row in result["rows"]}
    assert values == {"exact_match (strict-match)": (0, True), "exact_match (flexible-extract)": (0.75, False)}
    assert result["shots"] == {"gsm8k": 1}


def test_answers_are_generated_with_the_cache_asked_for(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KvCache] = []

    def watched(*args: Any) -> KvCache:
        made.append(make_cache(*args))
        return made[-1]

    monkeypatch.setattr("laconic.kv.attach.make_cache", watched)
    write(tmp_path / "gsm8k_train.jsonl", [{"question": "How many?", "answer": "Two and two. #### 4"}])
    write(tmp_path / "gsm8k_test.jsonl", [{"question": phrase(0, 3), "answer": "#### 4"}])
    kv = "{method: kivi, k_bits: 2, v_bits: 2, group_size: 16, residual_length: 16}"
    result = evaluate_tasks(roomy, TaskOptions(tasks=["gsm8k"], data=tmp_path, fewshot=1, kv=[kv], quiet=True))
    assert result["cache"] == "kivi k_bits 2 v_bits 2 group_size 16 residual_length 16"
    # One is made to see whether the model can have it, one for the batch of prompts.
    assert made[-1].get_seq_length() > 100
    assert made[-1].effective_bits() < 8


def request(kind: Any, task: str, document: int, *asked: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, asked, 0, (task, document, 1))


def test_prompts_are_cut_as_lm_eval_cuts_them_and_counted(roomy: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from laconic.evaluation.lm import OpenedLM

    model, tokenizer = original(roomy, torch.float32), tokenizer_of(roomy)
    ours = OpenedLM(model, tokenizer, context_length=24, batch_size=3)
    theirs = HFLM(original(roomy, torch.float32), tokenizer=tokenizer, max_length=24, batch_size=3)
    # From prompts that just fit to such as do not by far; of the last the answer fills the context by itself.
    prompts = [(phrase(i, 2 + i % 9), " " + LETTERS[i : i + 3 + i % 5]) for i in range(20)] + [
        (LETTERS[:9], LETTERS[:24])
    ]
    likely = [request("loglikelihood", "a", i, *prompt) for i, prompt in enumerate(prompts)]
    found = ours.loglikelihood(likely, disable_tqdm=True)
    expected = theirs.loglikelihood(likely, disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], rel=1e-5)
    assert [first for _, first in found] == [first for _, first in expected]
    how = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    written = [request("generate_until", "b", i // 2, prompt, how) for i, (prompt, _) in enumerate(prompts)]
    assert ours.generate_until(written, disable_tqdm=True) == theirs.generate_until(written, disable_tqdm=True)
    # What is read: a BOS, the prompt, and the answer but for its last token.
    tokens = [len(tokenizer(a + b).input_ids) - 1 for a, b in prompts]
    assert 24 in tokens
    beside = {i // 2 for i, (prompt, _) in enumerate(prompts) if len(tokenizer(prompt).input_ids) + 6 > 24}
    assert ours.cut == {"a": sum(n > 24 for n in tokens), "b": len(beside)}
    assert 0 < ours.cut["a"] < len(prompts)
    assert 0 < ours.cut["b"] < len(prompts) / 2
    assert ours.refused == {}


def test_a_task_that_does_not_fit_is_named_and_the_others_are_kept(
    laconic: Laconic, llama: Path, tmp_path: Path
) -> None:
    data, made = tmp_path / "data", press(llama, tmp_path / "w8", rtn("W8A16"))
    data.mkdir()
    write(data / "piqa.jsonl", multiple_choice(4, choices=2))
    write(data / "gsm8k_test.jsonl", [{"question": phrase(0, 2), "answer": "#### 4"}])
    told = ("--data", data, "--fewshot", "0", "--baseline", llama)
    assert laconic("eval", "tasks", made.path, "piqa", *told).code == 0
    alone = made.results["tasks-piqa-0shot"]
    ran = laconic("eval", "tasks", made.path, "gsm8k,piqa", *told)
    kept = made.results["tasks-gsm8k+piqa-0shot"]
    assert [kept[key] for key in ("rows", "calibration", "shots")] == [
        alone[key] for key in ("rows", "calibration", "shots")
    ]
    assert list(kept["refused"]) == ["gsm8k"]
    assert alone["refused"] == {}
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert line.startswith(
        "laconic: 1 of 2 tasks not measured (the others are), the first: the task 'gsm8k' has answers"
    )
    assert "without gsm8k, whose answers leave no space for a prompt in 256 tokens" in " ".join(ran.out.split())


def test_a_group_of_which_a_task_does_not_fit_gives_way_to_the_others(roomy: Path, tmp_path: Path) -> None:
    for name, words in {"blimp_adjunct_island": 9, "blimp_inchoative": 3}.items():
        pairs = [{"sentence_good": phrase(5 * i, words), "sentence_bad": phrase(5 * i + 2, words)} for i in range(6)]
        write(tmp_path / f"{name}.jsonl", pairs)
    result = evaluate_tasks(roomy, TaskOptions(tasks=["blimp"], data=tmp_path, context_length=32, quiet=True))
    assert list(result["refused"]) == ["blimp_adjunct_island"]
    assert [row["task"] for row in result["rows"]] == ["blimp_inchoative"]
    assert result["subtasks"] == []
    assert list(result["shots"]) == ["blimp_inchoative"]
    assert [row["task"] for row in result["calibration"]] == ["blimp_inchoative"]


def test_the_table_says_how_many_prompts_were_cut(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    rows = multiple_choice(6)
    for row in rows[:2]:
        row["question"] = phrase(0, 12)
    write(tmp_path / "arc_easy.jsonl", rows)
    write(tmp_path / "mmlu.jsonl", [row | {"subject": "anatomy" if i else "virology"} for i, row in enumerate(rows)])
    ran = laconic("eval", "tasks", llama, "arc_easy,mmlu", "--data", tmp_path, "--context-length", "90")
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "prompts truncated at the beginning to fit 90 tokens: mmlu 6 of 6, arc_easy 2 of 6" in said


def test_a_result_is_kept_with_all_that_it_depends_on(artifact: Artifact, roomy: Path, tmp_path: Path) -> None:
    write(tmp_path / "piqa.jsonl", multiple_choice(5, choices=2))
    how = {"baseline": str(roomy), "tasks": ["piqa"], "data": tmp_path, "limit": 3, "context_length": 200}
    result = evaluate_tasks(artifact.path, TaskOptions(**how, batch_size=2, quiet=True))
    assert artifact.results["tasks-piqa-3"] == result
    assert [row["documents"] for row in result["rows"]] == [3, 3]
    told = ("limit", "context_length", "batch_size", "dtype", "device", "shots", "task_versions")
    assert [result[key] for key in told] == [3, 200, 2, "bfloat16", "cpu", {"piqa": 0}, {"piqa": 1.0}]
    assert result["seeds"]["fewshot_random_seed"] == 1234
    assert result["versions"]["lm-eval"] == version("lm-eval")


def test_a_plain_model_is_measured_alone_in_silence_and_left_as_it_is(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "piqa.jsonl", multiple_choice(4, choices=2))
    before = sorted(roomy.iterdir())
    result = evaluate_tasks(roomy, TaskOptions(tasks=["piqa"], data=tmp_path, quiet=True))
    assert "difference" not in result["rows"][0]
    assert result["mean_retention"] is None
    assert sorted(roomy.iterdir()) == before
    assert capfd.readouterr() == ("", "")


def test_mmlu_is_a_group_of_its_subjects(roomy: Path, tmp_path: Path) -> None:
    rows = [r | {"subject": "anatomy" if i % 3 else "virology"} for i, r in enumerate(multiple_choice(9))]
    write(tmp_path / "mmlu.jsonl", rows)
    result = evaluate_tasks(roomy, TaskOptions(tasks=["mmlu"], data=tmp_path, quiet=True))
    (row,), parts = result["rows"], {r["task"]: r for r in result["subtasks"]}
    assert {name: r["documents"] for name, r in parts.items()} == {"mmlu_anatomy": 6, "mmlu_virology": 3}
    # Each document counts the same.
    assert row["value"] == pytest.approx(sum(r["documents"] * r["value"] for r in parts.values()) / 9)


@pytest.mark.slow
def test_names_of_the_hub_are_opened_with_their_groups_and_tags(
    roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is played by the rows of a local file, which then gives the same result as that file."""
    import datasets

    rows = multiple_choice(6)
    write(tmp_path / "arc_easy.jsonl", rows)
    write(tmp_path / "mmlu.jsonl", [r | {"subject": "anatomy"} for r in rows])

    def hub(path: str, name: str, **_: Any) -> Any:
        letters = list("ABCD")
        docs = {
            "allenai/ai2_arc": [
                {
                    "question": r["question"],
                    "choices": {"text": r["choices"], "label": letters},
                    "answerKey": letters[r["label"]],
                }
                for r in rows
            ],
            "cais/mmlu": [{"question": r["question"], "choices": r["choices"], "answer": r["label"]} for r in rows],
        }
        return dict.fromkeys(("train", "validation", "test", "dev"), datasets.Dataset.from_list(docs[path]))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    online = evaluate_tasks(roomy, TaskOptions(tasks=["ai2_arc", "mmlu"], quiet=True))
    local = evaluate_tasks(roomy, TaskOptions(tasks=["arc_easy", "mmlu_anatomy"], data=tmp_path, quiet=True))
    values = {(r["task"], r["metric"]): r["value"] for r in online["rows"] + online["subtasks"]}
    assert [r["task"] for r in online["rows"]] == ["mmlu", "arc_challenge", "arc_challenge", "arc_easy", "arc_easy"]
    assert [r["tasks"] for r in online["rows"]] == [57, 1, 1, 1, 1]
    assert ("mmlu_stem", "acc") in values
    assert all(values[r["task"], r["metric"]] == r["value"] for r in local["rows"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["arc_eazy"], "no task 'arc_eazy' over local files; did you mean arc_easy"),
        (["piqa"], "the task 'piqa' needs {data}/piqa.jsonl, which does not exist; check --data"),
        (["blimp"], "{data} has no blimp*.jsonl for the task 'blimp'"),
        ([","], "no task is named; name some, as in hellaswag,arc_easy"),
        (["arc_easy", "--limit", "0"], "--limit 0 is less than 1"),
        (["arc_easy", "--fewshot", "-1"], "--fewshot -1 is less than 0"),
        (["arc_easy", "--windows", "3"], "No such option: --windows"),
        (
            ["arc_easy", "--kv", "{method: kivi}", "--kv", "{method: kv_int8}"],
            "tasks are measured with one cache; give --kv once, or compare ",
        ),
        (
            ["arc_easy", "--context-length", "4096"],
            "--context-length 4096 is not between 2 and the model's context of 256",
        ),
        (
            ["arc_easy", "--context-length", "5"],
            "the task 'arc_easy' has answers of up to 8 tokens, which leave no room for a prompt in a context of 5;",
        ),
        (
            ["arc_easy", "--fewshot", "2"],
            "the task 'arc_easy' with 2 examples in a prompt finds 0 in {data}/arc_easy_train.jsonl; add some",
        ),
        (
            ["gsm8k", "--fewshot", "0"],
            "the task 'gsm8k' has answers of up to 256 tokens, which leave no room for a prompt in a context of 256;",
        ),
        (["--limit", "3"], "Missing argument 'NAME,... | standard'"),
    ],
    ids=lambda p: " ".join(p) if isinstance(p, list) else "",
)
def test_wrong_input_is_told_in_a_line(
    flags: list[str], expected: str, laconic: Laconic, llama: Path, tmp_path: Path
) -> None:
    write(tmp_path / "arc_easy.jsonl", multiple_choice(2))
    write(tmp_path / "gsm8k_test.jsonl", [{"question": phrase(0, 2), "answer": "#### 4"}])
    said = laconic("eval", "tasks", llama, *flags, "--data", tmp_path).complaint
    assert said.startswith(expected.format(data=tmp_path))


GOOD = multiple_choice(1)[0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD | {"label": 4}, "has label 4, which is not an index (from 0) of its 4 answers"),
        (GOOD | {"label": "A"}, "needs 'label', a number"),
        ({"question": "Why?", "label": 0}, "needs 'choices', a list"),
        (GOOD | {"choices": ["yes", ""]}, "has an answer that is not a text, or is empty"),
        (["a"], "is not a JSON object; write one object per line"),
    ],
    ids=str,
)
def test_a_bad_row_is_named(row: Any, expected: str, laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "arc_easy.jsonl", [GOOD, row])
    said = laconic("eval", "tasks", llama, "arc_easy", "--data", tmp_path).complaint
    assert said == f"{tmp_path}/arc_easy.jsonl, line 2, {expected}"


def test_offline_the_fix_is_named(laconic: Laconic, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class Few(TaskManager):
        """Without reading fifteen thousand configs."""

        def __init__(self) -> None:
            import lm_eval.tasks

            super().__init__(include_path=str(Path(lm_eval.tasks.__file__).parent / "arc"), include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    assert laconic("eval", "tasks", llama, "arc_eazy").complaint == (
        "lm-eval has no task 'arc_eazy'; did you mean arc_easy?"
    )
    said = laconic("eval", "tasks", llama, "arc_easy").complaint
    assert said.startswith("the task 'arc_easy' could not be opened (Couldn't reach 'allenai/ai2_arc' on the Hub")
    assert said.endswith("its data set comes from the Hub: go online, or give local files with --data DIR")


def test_broken_weights_are_no_answers(roomy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(roomy, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, but what comes of it is not
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    write(tmp_path / "piqa.jsonl", multiple_choice(2, choices=2))
    with pytest.raises(ValueError, match="the model returns NaN or infinity in"):
        evaluate_tasks(broken, TaskOptions(tasks=["piqa"], data=tmp_path, quiet=True))


def test_the_table_and_the_page_show_it(laconic: Laconic, roomy: Path, text: Path, tmp_path: Path) -> None:
    made = press(roomy, tmp_path / "w3", rtn("W3A16", group_size=32))
    write(tmp_path / "piqa.jsonl", multiple_choice(8, choices=2))
    run = laconic("eval", "tasks", made.path, "piqa", "--baseline", roomy, "--data", tmp_path)
    assert (run.code, run.err) == (0, "")
    (row, _) = made.results["tasks-piqa"]["rows"]
    shown = f"{row['baseline']:.4f} ± {row['baseline_stderr']:.4f}"
    assert shown in run.out
    assert f"{row['difference']:+.4f} ± {row['difference_stderr']:.4f}" in run.out
    laconic("eval", made.path, "--text", text, "--context-length", "32", "--windows", "2")
    page = tmp_path / "page.html"
    assert laconic("report", made.path, "--output", page).code == 0
    assert f"<td>{shown}</td>" in page.read_text()
