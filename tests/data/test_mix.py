"""A mix has the stated proportions, in an order that hangs on the seed alone; answers are told from questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from laconic.checkpoint.source import load_tokenizer
from laconic.data.mix import Example, Mix, TextSource, collate, describe_mix, read_mix
from laconic.data.text import evaluation_windows
from tiny import make_text

TEXT = make_text(2000)
ROWS = [{"instruction": f"say {i}", "input": "now" * (i % 2), "output": f"so be it {i}"} for i in range(20)]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(llama)


def a_file(folder: Path, name: str, content: Any) -> str:
    file = folder / name
    if file.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def read(parts: list[TextSource], tokenizer: PreTrainedTokenizerBase, **keys: Any) -> Mix:
    given_ = {"length": 32, "held_out": 0.1, "held_out_samples": 8, "seed": 0}
    return read_mix(parts, tokenizer, **given_ | keys)


def blank(sizes: list[int], weights: list[float], seed: int = 0) -> Mix:
    one = Example(torch.zeros(2, dtype=torch.long), torch.tensor([False, True]))
    return Mix(tuple((one,) * n for n in sizes), tuple(w / sum(weights) for w in weights), (), seed)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 5), min_size=4, max_size=4),
    count=st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_every_part_has_its_share_all_along(sizes: list[int], weights: list[float], count: int, seed: int) -> None:
    mix = blank(sizes, weights[: len(sizes)], seed)
    order = mix.order(count)
    assert order == mix.order(count + 7)[:count]
    taken = [0] * len(sizes)
    for n, (part, _) in enumerate(order, 1):
        taken[part] += 1
        assert all(abs(t - share * n) <= len(sizes) - 1 + 1e-9 for t, share in zip(taken, mix.shares, strict=True))
    # No sequence comes again before all of its part have come.
    for p, size in enumerate(sizes):
        own = [i for part, i in order if part == p]
        for start in range(0, len(own), size):
            once = own[start : start + size]
            assert len(set(once)) == len(once)


def test_an_epoch_ends_before_anything_comes_twice() -> None:
    mix = blank([70, 60], [0.7, 0.3])
    assert mix.epoch == 100
    assert len(set(mix.order(100))) == 100
    assert sum(p == 0 for p, _ in mix.order(100)) == 70


def test_another_seed_is_another_order() -> None:
    assert blank([20, 20], [1, 1]).order(30) != blank([20, 20], [1, 1], seed=1).order(30)


def test_text_comes_in_the_windows_of_evaluation(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    mix = read([TextSource(dataset=a_file(tmp_path, "a.txt", TEXT))], tokenizer)
    expected = {tuple(w.tolist()) for w in evaluation_windows([TEXT], tokenizer, length=32, limit=None)}
    every = (*mix.parts[0], *mix.held_out)
    assert {tuple(e.ids.tolist()) for e in every} == expected
    assert len(every) == len(expected)
    assert len(mix.held_out) == round(0.1 * len(expected))
    assert all(e.loss_mask.tolist() == [False] + [True] * 31 for e in every)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_of_instructions_the_answers_alone_are_wanted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    mix = read(
        [TextSource(dataset=a_file(tmp_path, name, ROWS), format="instruction")], tokenizer, length=128, held_out=0
    )
    for i, example in enumerate(mix.parts[0]):
        row = ROWS[i]
        asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert tokenizer.decode(example.ids) == f"<s>user: {asked}\nassistant: {row['output']}</s>"
        assert tokenizer.decode(example.ids[example.loss_mask]) == f"{row['output']}</s>"


def test_a_chat_goes_through_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    roles = ["system", "user", "assistant", "user", "assistant"]
    rows = [{"messages": [{"role": r, "content": f"{r[0]}{i}"} for i, r in enumerate(roles)]}]
    part = TextSource(dataset=a_file(tmp_path, "a.jsonl", rows), format="instruction")
    (example,) = read([part], tokenizer, length=128, held_out=0).parts[0]
    assert tokenizer.decode(example.ids).endswith("<user>u1;<assistant>a2;<user>u3;<assistant>a4;")
    assert tokenizer.decode(example.ids[example.loss_mask]) == "a2;a4;"


def test_everything_may_be_wanted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    part = TextSource(dataset=a_file(tmp_path, "a.json", ROWS), format="instruction", answers_only=False)
    mix = read([part], tokenizer, length=128, held_out=0)
    assert all(e.loss_mask[1:].all() for e in mix.parts[0])
    assert not any(e.loss_mask[0] for e in mix.parts[0])


def test_proportions_are_described(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [
        TextSource(dataset=a_file(tmp_path, "a.txt", TEXT), weight=3),
        TextSource(dataset=a_file(tmp_path, "a.json", ROWS), format="instruction", weight=1),
    ]
    mix = read(parts, tokenizer, length=64)
    order = mix.order(40)
    told = describe_mix(mix, parts, order)
    assert [t["share"] for t in told] == [0.75, 0.25]
    tokens = [sum(mix.at(o).targets for o in order if o[0] == i) for i in (0, 1)]
    assert told[0]["token_share"] == pytest.approx(tokens[0] / sum(tokens))
    assert read(parts, tokenizer, length=64).sha256 == mix.sha256
    assert read(parts, tokenizer, length=64, seed=1).sha256 != mix.sha256


def test_shorter_sequences_are_filled_up_behind() -> None:
    a = Example(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]))
    b = Example(torch.tensor([8]), torch.tensor([False]))
    ids, loss_mask = collate([a, b])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert loss_mask.tolist() == [[False, True, True], [False] * 3]


@pytest.mark.parametrize(
    ("name", "content", "format_", "expected"),
    [
        ("a.txt", "", "text", "is empty; name another dataset"),
        ("a.jsonl", [], "instruction", "is empty; name another dataset"),
        ("a.txt", "few words", "text", "has 9 tokens, less than one sequence of 32"),
        ("a.txt", TEXT[:40], "text", "gives 1 sequence(s) of 32 tokens, too few to hold some out"),
        ("a.jsonl", [{"text": "x"}], "instruction", "line 1, has neither 'messages' of role and content nor an"),
        ("a.json", {"instruction": "a"}, "instruction", "is no list of rows; write one row a line into a .jsonl"),
        ("a.json", "{", "instruction", "is not JSON: "),
        ("a.json", [{"instruction": "a" * 99, "output": "b"}], "instruction", "has no answer that begins within 32"),
    ],
)
def test_a_dataset_of_no_use_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: Any, format_: Any, expected: str
) -> None:
    part = TextSource(dataset=a_file(tmp_path, name, content), format=format_)
    with pytest.raises(ValueError, match=r"\S") as told:
        read([part], tokenizer)
    assert part.dataset in str(told.value)
    assert expected in str(told.value)
