"""A needle in a haystack: a number said once, at some depth of a long text, and asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.data.text import bos_prefix
from laconic.evaluate.through_cache import Caches, continue_greedily

_COLOURS = "red green blue white black golden silver brown grey purple orange pink yellow quiet broken hidden"
_THINGS = "bridge river castle garden tower forest island market window harbour mountain lantern violin wagon"


@dataclass(frozen=True)
class Form:
    """How a number is said and asked for: `{number}`, and `{name}` of what it belongs to. digits: of the number."""

    said: str
    asked: str
    digits: int = 5


FORMS = {
    "needle": Form(
        "\nThe secret number of the {name} is {number}. Remember it.\n",
        "\nWhat is the secret number of the {name}? The secret number of the {name} is",
    ),
    # As comments, for models of code; what the demo model learnt.
    "comment": Form(
        "\n# The secret number of the {name} is {number}. Remember it.\n",
        "\n# What is the secret number of the {name}? The secret number of the {name} is",
    ),
    # Mohtashami and Jaggi, arXiv 2305.16300.
    "passkey": Form(
        "\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
    ),
}


@dataclass(frozen=True)
class Prompt:
    """ids: of the whole prompt. number: the answer."""

    ids: list[int]
    number: str


@dataclass(frozen=True)
class Cell:
    """found: of `trials` needles at this depth (0: the beginning, 1: the end) of so many tokens."""

    length: int
    depth: float
    found: int
    trials: int


def depths_of(count: int) -> list[float]:
    """So many depths, evenly from the beginning to the end; the middle for one."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]


def room_for_answer(form: Form) -> int:
    """Tokens that an answer may take: its digits, a space, and enough more to see that the number ends there."""
    return form.digits + 2


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, hay: Sequence[int], form: Form, *, length: int, depth: float, seed: str
) -> Prompt:
    """A prompt that with its answer is of exactly `length` tokens. seed: of what is said, and where the hay begins.

    Raises: ValueError when hay, or length, is too short.
    """
    draw = random.Random(seed)
    name = f"{draw.choice(_COLOURS.split())} {draw.choice(_THINGS.split())}"
    number = "".join(draw.choices("0123456789", k=form.digits))
    said, asked = (
        list(tokenizer(part.format(name=name, number=number), add_special_tokens=False).input_ids)
        for part in (form.said, form.asked)
    )
    prefix = bos_prefix(tokenizer)
    room = length - room_for_answer(form) - len(prefix) - len(said) - len(asked)
    if room < 1:
        raise ValueError(f"--lengths {length} leaves no room for hay; the needle alone takes {length - room} tokens")
    if len(hay) < room:
        raise ValueError(
            f"the text has {len(hay)} tokens, too few for a haystack of {length}; give more --text or lower --lengths"
        )
    start = draw.randrange(len(hay) - room + 1)
    around = list(hay[start : start + room])
    at = round(depth * room)
    return Prompt([*prefix, *around[:at], *said, *around[at:], *asked], number)


def is_found(answer: str, number: str) -> bool:
    """Whether the first number of an answer is this one, to the digit."""
    first = re.match(r"\D*(\d+)", answer)
    return first is not None and first[1] == number


def find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hay: Sequence[int],
    caches: Caches,
    *,
    lengths: Sequence[int],
    depths: int = 5,
    trials: int = 4,
    form: Form = FORMS["needle"],
    chunk: int = 32,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, list[Cell]]:
    """Of every cache, the cells of lengths by depths. All caches are asked the same questions.

    Prompts are read in chunks through the cache, so that the question attends to what it keeps, and answered greedily.
    Raises: ValueError when a prompt cannot be made, or the model puts out NaN or infinity.
    """
    cells: dict[str, list[Cell]] = {name: [] for name in caches}
    for length in lengths:
        asked = [(depth, trial) for depth in depths_of(depths) for trial in range(trials)]
        prompts = [
            make_prompt(tokenizer, hay, form, length=length, depth=depth, seed=f"{seed}/{length}/{depth}/{trial}")
            for depth, trial in asked
        ]
        for name, new_cache in caches.items():
            hits = []
            for begin in range(0, len(prompts), batch_size):
                some = prompts[begin : begin + batch_size]
                rows: Tensor = torch.tensor([p.ids for p in some])
                answers = continue_greedily(model, rows, new_cache(), chunk=chunk, tokens=room_for_answer(form))
                hits += [is_found(_said(tokenizer, a), p.number) for a, p in zip(answers, some, strict=True)]
            for i, depth in enumerate(depths_of(depths)):
                cells[name].append(Cell(length, depth, sum(hits[i * trials : (i + 1) * trials]), trials))
    return cells


def _said(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
