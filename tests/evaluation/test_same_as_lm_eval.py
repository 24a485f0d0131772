"""A task over local files gives the number of lm-eval's own task on the same rows: its own config, its own model class
on plain transformers, rows in the form that the Hub has them in."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts import original
from commands import Laconic
from laconic.evaluation.options import TaskOptions
from laconic.evaluation.suites import STANDARD
from laconic.evaluation.tasks import evaluate_tasks
from tiny import make_model, make_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'laconic[eval]'"
)

Row = dict[str, Any]
TEXT = make_text(6000).replace(" ", "")
LABELS = [int(i) for i in np.random.default_rng(7).integers(0, 4, 14)]


def words(at: int, n: int = 3) -> str:
    return " ".join(TEXT[at * 11 + 4 * i :][: 2 + (at + i) % 3] for i in range(n))


def choices(i: int, n: int = 4) -> list[str]:
    return [TEXT[37 * i + 8 * c :][: 5 + (i + c) % 3] for c in range(n)]


LETTERS = "ABCD"
# By task: the file of local rows, and of each document the row there and the row as the Hub has it.
PAIRS: dict[str, tuple[str, list[tuple[Row, Row]]]] = {
    "arc_easy": (
        "arc_easy",
        [
            (
                {"question": words(i), "choices": choices(i), "label": k},
                {
                    "id": str(i),
                    "question": words(i),
                    "choices": {"text": choices(i), "label": list(LETTERS)},
                    "answerKey": LETTERS[k],
                },
            )
            for i, k in enumerate(LABELS)
        ],
    ),
    "hellaswag": (
        "hellaswag",
        [
            (
                {"ctx": f"Baking: The cook has {words(i)}. {words(i + 1)}", "endings": choices(i), "label": k},
                {
                    "activity_label": "Baking",
                    "ctx_a": f"The cook has {words(i)}.",
                    "ctx_b": words(i + 1),
                    "endings": choices(i),
                    "label": str(k),
                },
            )
            for i, k in enumerate(LABELS)
        ],
    ),
    "mmlu_anatomy": (
        "mmlu",
        [
            (
                {"subject": "anatomy", "question": words(i), "choices": choices(i), "label": k},
                {"subject": "anatomy", "question": words(i), "choices": choices(i), "answer": k},
            )
            for i, k in enumerate(LABELS)
        ],
    ),
    "winogrande": (
        "winogrande",
        [
            (
                {"question": f"{words(i)} _ came late.", "choices": choices(i, 2), "label": k % 2},
                {
                    "sentence": f"{words(i)} _ came late.",
                    "option1": choices(i, 2)[0],
                    "option2": choices(i, 2)[1],
                    "answer": str(k % 2 + 1),
                },
            )
            for i, k in enumerate(LABELS)
        ],
    ),
    "boolq": (
        "boolq",
        [
            (
                {"passage": words(i, 6), "question": words(i), "label": k % 2},
                {"passage": words(i, 6), "question": words(i), "label": k % 2, "idx": i},
            )
            for i, k in enumerate(LABELS)
        ],
    ),
    "c4": ("c4", [({"text": words(i, 9)}, {"text": words(i, 9), "url": "x"}) for i in range(5)]),
    "wikitext": ("wikitext", [({"page": words(i, 9)}, {"page": words(i, 9)}) for i in range(5)]),
}
HOMES = {"arc_easy": "arc", "mmlu_anatomy": "mmlu/default", "boolq": "super_glue/boolq"}


def write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "roomy", max_position_embeddings=1024)


Measured = tuple[Row, dict[str, Row]]


def measure(model: Path, tasks: Sequence[str], folder: Path, context: int | None) -> Measured:
    """Our result of tasks, and what lm-eval says of each."""
    for file, pairs in map(PAIRS.get, tasks):  # type: ignore[misc]
        write(folder / f"{file}.jsonl", [local for local, _ in pairs])
    options = TaskOptions(tasks=list(tasks), data=folder, dtype="float32", context_length=context, quiet=True)
    return evaluate_tasks(model, options), lm_evals_own(model, tasks, context)


def lm_evals_own(model: Path, tasks: Sequence[str], context: int | None) -> dict[str, Row]:
    """What lm-eval says of its tasks by itself, the Hub played by rows in its form."""
    import datasets
    import lm_eval.tasks
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    home = Path(lm_eval.tasks.__file__).parent
    lm = HFLM(
        original(model, torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=3,
        max_length=context,
    )
    values = {}
    for task in tasks:
        rows = datasets.Dataset.from_list([hub for _, hub in PAIRS[task][1]])
        splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), rows))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(datasets, "load_dataset", lambda *_, splits=splits, **__: splits)
            manager = lm_eval.tasks.TaskManager(include_path=str(home / HOMES.get(task, task)), include_defaults=False)
            found: Any = evaluator.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
        values[task] = {key.partition(",")[0]: v for key, v in found["results"][task].items() if isinstance(v, float)}
    return values


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(model, tuple(PAIRS), tmp_path_factory.mktemp("whole"), None)


# What is cut hangs on the kind of request: likelihoods of short and of long ends, and of running text.
CUT = ("arc_easy", "hellaswag", "wikitext")


@pytest.fixture(scope="module")
def cut(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(model, CUT, tmp_path_factory.mktemp("cut"), 24)


CASES = [(task, "whole") for task in PAIRS] + [(task, "cut") for task in CUT]


@pytest.mark.parametrize(("task", "how"), CASES, ids=[f"{task}-{how}" for task, how in CASES])
def test_a_local_task_is_lm_evals_own(task: str, how: str, request: pytest.FixtureRequest) -> None:
    result, every = request.getfixturevalue(how)
    theirs, pairs = every[task], PAIRS[task][1]
    # A text without a question is read in windows, which lose nothing.
    assert (task in result["cut"]) == (how == "cut" and task not in ("c4", "wikitext"))
    rows = [row for row in (*result["rows"], *result["subtasks"]) if row["task"] == task]
    assert rows
    for row in rows:
        assert row["value"] == pytest.approx(theirs[row["metric"]], rel=1e-5), row["metric"]
        assert row["documents"] == len(pairs)
        low, high = row["interval"]
        assert low <= row["value"] <= high
    calibrations = [found for found in result["calibration"] if found["task"] == task]
    for found in calibrations:
        # What is right is what lm-eval's accuracy counts.
        assert found["accuracy"] == pytest.approx(theirs["acc"])
    assert len(calibrations) == (0 if task in ("c4", "wikitext") else 1)


def test_the_suite_offline_is_what_the_folder_has_and_says_so(laconic: Laconic, model: Path, tmp_path: Path) -> None:
    for task in ("arc_easy", "mmlu_anatomy", "c4"):
        file, pairs = PAIRS[task]
        write(tmp_path / f"{file}.jsonl", [local for local, _ in pairs[:6]])
    ran = laconic("eval", "tasks", model, "standard", "--data", tmp_path, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["tasks"] == ["mmlu", "arc_easy", "c4"]
    assert told["left_out"] == [t for t in STANDARD if t not in told["tasks"]]
    assert {row["task"] for row in told["calibration"]} == {"mmlu", "arc_easy"}
    said = laconic("eval", "tasks", model, "standard", "--data", tmp_path)
    assert "without hellaswag" in said.out
    empty = tmp_path / "empty"
    empty.mkdir()
    complaint = laconic("eval", "tasks", model, "standard", "--data", empty).complaint
    assert complaint.startswith(f"{empty} has no file of the standard suite (mmlu, hellaswag, ")


@pytest.mark.slow
def test_the_suites_names_are_lm_evals() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    assert [name for name in STANDARD if not manager.match_tasks([name])] == []


def test_errors_of_word_perplexity_are_those_of_resampling(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    pages = [
        {"page": words(int(i), int(n))} for i, n in zip(rng.integers(0, 300, 60), rng.integers(2, 20, 60), strict=True)
    ]
    write(tmp_path / "wikitext.jsonl", pages)
    result = evaluate_tasks(model, TaskOptions(tasks=["wikitext"], data=tmp_path, dtype="float32", quiet=True))
    for row in result["rows"]:
        low, high = row["interval"]
        assert row["stderr"] == pytest.approx((high - low) / (2 * 1.96), rel=0.25)
        assert math.isfinite(row["stderr"])
