"""Contamination, against a count by hand and against a slow one."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from laconic.cards.language import language_mix
from laconic.cards.overlap import Overlap, evaluation_texts, index, overlap

WORDS = [f"w{i}" for i in range(40)]


def test_a_sentence_that_stands_in_both_is_found_and_counted() -> None:
    seen = index(["before it " + " ".join(WORDS[:20]) + " after it"])
    documents = [" ".join(WORDS[:14]), " ".join(WORDS[15:35]), "too short to judge", ""]
    # 14 words have 2 runs of 13, both shared; 20 words have 8, none of them.
    assert overlap(seen, documents) == Overlap(13, documents=4, judged=2, hit=1, ngrams=10, shared=2)


def test_case_and_punctuation_do_not_hide_it() -> None:
    text = "The quick, brown fox: it jumps - over the lazy dog; and then (again) it sleeps."
    assert overlap(index([text.upper()]), [text.replace(",", "").replace(";", " ...")]).hit == 1


def test_twelve_words_are_not_thirteen() -> None:
    assert overlap(index([" ".join([*WORDS[:12], "x"])]), [" ".join([*WORDS[:12], "y"])]).hit == 0


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=4),
    st.integers(2, 5),
)
def test_it_is_what_comparing_every_run_gives(ours: list[list[str]], theirs: list[list[str]], n: int) -> None:
    def runs(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    known = [run for words in ours for run in runs(words)]
    asked = [run for words in theirs for run in runs(words)]
    found = overlap(index([" ".join(w) for w in ours], n), [" ".join(w) for w in theirs], n)
    assert found.documents == len(theirs)
    assert found.judged == sum(len(w) >= n for w in theirs)
    assert found.hit == sum(any(run in known for run in runs(w)) for w in theirs)
    assert found.ngrams == len(set(asked))
    assert found.shared == len({run for run in asked if run in known})


def test_a_tasks_row_is_all_its_words(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps({"question": "one two", "choices": ["three", "four"], "label": 1}) + "\n")
    assert [text.split() for text in evaluation_texts(str(file))] == [["one", "two", "three", "four"]]


def test_languages_are_told_by_share() -> None:
    english = "The weather was fine that day, and everybody in the village went out to look at the river."
    german = "Das Wetter war an diesem Tag schön, und alle im Dorf gingen hinaus, um sich den Fluss anzusehen."
    assert language_mix([english, english, english, german]) == {"en": 0.75, "de": 0.25}
    assert language_mix(["", "  "]) is None
