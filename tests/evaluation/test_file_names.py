"""Names of files: readable, short enough for any disk, and never those of something else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from laconic.evaluation.file_names import slug

WORDS = st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=60), min_size=1, max_size=6)


def test_plain_words_are_kept() -> None:
    assert slug(["arc_easy", "boolq"]) == "arc_easy+boolq"
    assert slug(["kivi k_bits 2"], "-") == "kivi_k_bits_2"
    assert slug(["a/b"]).startswith("a_b-")


@given(WORDS, WORDS)
def test_other_words_have_another_name(some: list[str], others: list[str]) -> None:
    one, other = ("+".join(words).replace(" ", "_") for words in (some, others))
    assert one == other or slug(some) != slug(others)
    assert len(slug(some)) <= 97
    assert "/" not in slug(some)
