"""Needles: the demo model finds them in 16 bit and in 8, and not with keys of a single bit."""

from __future__ import annotations

import inspect
import shelve
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import laconic
from laconic.checkpoint.source import load_tokenizer
from laconic.evaluation.needle import TEMPLATES, NeedleOptions, depths_of, find_needles, is_correct, make_prompt
from laconic.evaluation.through_cache import PLAIN, plain_cache
from laconic.kv.attach import make_cache
from laconic.kv.format import KvFormat
from laconic.kv.scheme import uniform

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return laconic.load(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def hay(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A module that the model was not trained on."""
    return list(tokenizer(inspect.getsource(shelve), add_special_tokens=False).input_ids)


def test_damage_is_seen(demo: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hay: list[int]) -> None:
    caches = {PLAIN: partial(plain_cache, demo)}
    for bits in (8, 1):
        scheme = uniform("test", KvFormat(bits, "channel", 32), KvFormat(8, "token", 32), 5, residual_length=32)
        caches[f"keys of {bits}"] = partial(make_cache, demo, scheme)
    found = find_needles(
        demo,
        tokenizer,
        hay,
        caches,
        [256, 384],
        NeedleOptions(depths=3, trials=1, template=TEMPLATES["comment"], chunk=64),
    )
    assert [(c.length, c.depth, c.trials) for c in found[PLAIN]] == [
        (n, d, 1) for n in (256, 384) for d in (0.0, 0.5, 1.0)
    ]
    shares = {name: sum(c.correct for c in cells) for name, cells in found.items()}
    assert shares[PLAIN] == shares["keys of 8"] == 6
    assert shares["keys of 1"] == 0


@pytest.mark.slow
def test_needles_are_found_over_the_whole_context(
    demo: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hay: list[int]
) -> None:
    caches = {PLAIN: partial(plain_cache, demo)}
    found = find_needles(
        demo, tokenizer, hay, caches, [1024, 2048], NeedleOptions(trials=2, template=TEMPLATES["comment"])
    )
    assert sum(c.correct for c in found[PLAIN]) >= 18


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_its_needle_where_it_should(
    tokenizer: PreTrainedTokenizerBase, hay: list[int], form: str, depth: float
) -> None:
    prompt = make_prompt(tokenizer, hay, TEMPLATES[form], length=400, depth=depth, seed="1")
    # An answer of five digits, a space and one more fits.
    assert len(prompt.ids) == 400 - 7
    assert prompt.ids[0] == tokenizer.bos_token_id
    before, after = tokenizer.decode(prompt.ids[1:]).split(f"is {prompt.number}. Remember it.")
    hay_before, _, _ = before.rpartition("\n")
    hay_after, asked, nothing = after.rpartition("\n")
    assert asked + nothing == TEMPLATES[form].question.format(name=_name(before))
    sizes = [len(tokenizer(part).input_ids) for part in (hay_before, hay_after)]
    assert sizes[0] / sum(sizes) == pytest.approx(depth, abs=0.05)


def _name(said: str) -> str:
    """Of what the number is told at the end of this."""
    return said.rpartition("number of the ")[2].strip()


def test_prompts_are_repeatable_and_differ(tokenizer: PreTrainedTokenizerBase, hay: list[int]) -> None:
    make = partial(make_prompt, tokenizer, hay, TEMPLATES["needle"], length=200, depth=0.5)
    assert make(seed="a") == make(seed="a")
    assert make(seed="a").number != make(seed="b").number


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 48213", True),
        (" 48213.\n", True),
        (": 48213 and 7", True),
        (" 482137", False),
        (" 4821", False),
        (" 1. 48213", False),
        (" unknown", False),
        ("", False),
    ],
)
def test_an_answer_is_the_first_number_to_the_digit(answer: str, found: bool) -> None:
    assert is_correct(answer, "48213") == found


def test_depths_are_even() -> None:
    assert depths_of(5) == [0, 0.25, 0.5, 0.75, 1]
    assert depths_of(1) == [0.5]


@pytest.mark.parametrize(
    ("length", "reason"),
    [(40, "--lengths 40 leaves no room for hay; the needle alone takes"), (5000, "too few for a haystack of 5000")],
)
def test_hay_that_does_not_fit(tokenizer: PreTrainedTokenizerBase, hay: list[int], length: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_prompt(tokenizer, hay, TEMPLATES["needle"], length=length, depth=0.5, seed="")
