"""A README.md that two write: nothing that a person wrote is lost."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from laconic.cards.readme import merge

OURS = {"license": "mit", "tags": ["laconic"]}
NEW = {"license": "mit", "tags": ["laconic", "gptq"], "base_model": "owner/model"}


def front(text: str) -> dict[str, object]:
    return dict(yaml.safe_load(text.split("---")[1]))


def test_a_new_file_is_a_card() -> None:
    text = merge(None, OURS, "# Body", []).text
    assert ModelCard(text).data.to_dict() == OURS
    assert "# Body" in text


def test_what_stands_outside_of_the_marks_stays() -> None:
    old = merge(None, OURS, "old body", []).text
    edited = old.replace("<!-- laconic:begin", "My own words.\n\n<!-- laconic:begin") + "\nAnd more.\n"
    merged = merge(edited, NEW, "new body", [OURS])
    assert "My own words." in merged.text
    assert merged.text.endswith("\nAnd more.\n")
    assert "new body" in merged.text
    assert "old body" not in merged.text
    assert front(merged.text) == NEW
    assert merged.user_keys == ()


def test_metadata_that_a_person_changed_added_or_took_away_stays_so() -> None:
    old = merge(None, OURS | {"library_name": "transformers"}, "body", []).text
    edited = old.replace("license: mit", "license: apache-2.0\nthumbnail: mine.png").replace(
        "library_name: transformers\n", ""
    )
    merged = merge(edited, NEW | {"library_name": "transformers"}, "body", [OURS | {"library_name": "transformers"}])
    assert front(merged.text) == NEW | {"license": "apache-2.0", "thumbnail": "mine.png"}
    assert merged.user_keys == ("license", "library_name")


def test_whichever_of_the_two_states_a_kill_left_is_known_as_ours() -> None:
    for state in (OURS, NEW):
        merged = merge(merge(None, state, "body", []).text, NEW | {"tags": []}, "body", [OURS, NEW])
        assert front(merged.text) == NEW | {"tags": []}


def test_metadata_of_which_nothing_is_known_is_a_persons() -> None:
    merged = merge(merge(None, OURS, "body", []).text, NEW, "body", [])
    assert front(merged.text) == NEW | {"tags": ["laconic"]}
    assert merged.user_keys == ("tags",)


@pytest.mark.parametrize(
    "old",
    [
        "# Written by hand\n",
        "<!-- laconic:begin -->",
        "<!-- laconic:begin -->a<!-- laconic:end -->\n<!-- laconic:begin -->b<!-- laconic:end -->",
        "---\n[: no\n---\n<!-- laconic:begin -->a<!-- laconic:end -->",
        "---\n- a list\n---\n<!-- laconic:begin -->a<!-- laconic:end -->",
    ],
)
def test_a_file_of_which_it_is_not_clear_what_is_whose_is_refused(old: str) -> None:
    with pytest.raises(ValueError, match=r"marks|metadata"):
        merge(old, OURS, "body", [OURS])


@given(st.text(st.characters(exclude_characters="\r"), max_size=80), st.text(max_size=40))
def test_any_text_around_the_marks_survives_any_body(above: str, body: str) -> None:
    text = merge(None, OURS, "first", []).text
    head, _, tail = text.partition("\n<!-- laconic:begin")
    if "laconic:" in above + body:
        return
    edited = f"{head}\n{above}\n<!-- laconic:begin{tail}"
    merged = merge(merge(edited, NEW, body, [OURS]).text, NEW, "last", [OURS, NEW]).text
    assert f"\n{above}\n<!-- laconic:begin" in merged
    assert "last" in merged
