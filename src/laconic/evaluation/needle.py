"""Needle in a haystack: a number is stated once at some depth of a long text, and asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.data.text import bos_prefix
from laconic.evaluation.options import NEEDLE_PROMPTS
from laconic.evaluation.through_cache import Caches, continue_greedily

_COLOURS = "red green blue white black golden silver brown grey purple orange pink yellow quiet broken hidden"
_THINGS = "bridge river castle garden tower forest island market window harbour mountain lantern violin wagon"


@dataclass(frozen=True)
class Template:
    """Wording of a needle and its question; both may contain `{number}`, and `{name}` of what the number belongs to.

    Attributes:
        statement: The needle.
        question: The question, which the answer continues.
        digits: Number of digits of the number.
    """

    statement: str
    question: str
    digits: int = 5


TEMPLATES = {
    "needle": Template(
        "\nThe secret number of the {name} is {number}. Remember it.\n",
        "\nWhat is the secret number of the {name}? The secret number of the {name} is",
    ),
    # As comments, for models of code; the demo model was trained on them.
    "comment": Template(
        "\n# The secret number of the {name} is {number}. Remember it.\n",
        "\n# What is the secret number of the {name}? The secret number of the {name} is",
    ),
    # Mohtashami and Jaggi, arXiv 2305.16300.
    "passkey": Template(
        "\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
    ),
}
assert tuple(TEMPLATES) == NEEDLE_PROMPTS


@dataclass(frozen=True)
class Prompt:
    """A haystack with a needle and its question.

    Attributes:
        ids: Token ids.
        number: The right answer.
    """

    ids: list[int]
    number: str


@dataclass(frozen=True)
class Cell:
    """A cell of the heat map.

    Attributes:
        length: Tokens of the context.
        depth: Depth of the needles, from 0 (beginning) to 1 (end).
        correct: Number of right answers.
        trials: Number of needles.
    """

    length: int
    depth: float
    correct: int
    trials: int

    def to_json(self) -> dict[str, Any]:
        """Return the cell as results record it: its right answers are `found` there."""
        return {"length": self.length, "depth": self.depth, "found": self.correct, "trials": self.trials}


@dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """Options of placing and reading needles.

    Attributes:
        depths: Number of depths, evenly from the beginning to the end.
        trials: Number of needles per length and depth.
        template: Wording of the needles.
        chunk: Tokens per forward pass of a prompt.
        batch_size: Prompts per forward pass.
        seed: Seed of the numbers, names and haystacks.
    """

    depths: int = 5
    trials: int = 4
    template: Template = TEMPLATES["needle"]
    chunk: int = 32
    batch_size: int = 8
    seed: int = 0


def depths_of(count: int) -> list[float]:
    """Return depths spread evenly from 0 to 1; 0.5 for one.

    Args:
        count: Number of depths, at least 1.
    """
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.5]


def answer_tokens(template: Template) -> int:
    """Return the number of tokens of an answer: the digits, a space, and one more to see that the number ends.

    Args:
        template: Wording of the needles.
    """
    return template.digits + 2


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, hay: Sequence[int], template: Template, *, length: int, depth: float, seed: str
) -> Prompt:
    """Make a prompt that, with its answer, has exactly `length` tokens.

    Args:
        tokenizer: Tokenizer of the model.
        hay: Token ids of the text.
        template: Wording of the needle.
        length: Tokens of the prompt and its answer.
        depth: Depth of the needle, from 0 to 1.
        seed: Seed of the number, the name and the start of the hay.

    Returns:
        The prompt.

    Raises:
        ValueError: The hay or the length is too short.
    """
    rng = random.Random(seed)
    name = f"{rng.choice(_COLOURS.split())} {rng.choice(_THINGS.split())}"
    number = "".join(rng.choices("0123456789", k=template.digits))
    statement, question = (
        list(tokenizer(part.format(name=name, number=number), add_special_tokens=False).input_ids)
        for part in (template.statement, template.question)
    )
    prefix = bos_prefix(tokenizer)
    room = length - answer_tokens(template) - len(prefix) - len(statement) - len(question)
    if room < 1:
        raise ValueError(
            f"--lengths {length} leaves no room for hay; the needle alone takes {length - room} tokens, so raise it"
        )
    if len(hay) < room:
        raise ValueError(
            f"the text has {len(hay)} tokens, too few for a haystack of {length}; give more --text or lower --lengths"
        )
    start = rng.randrange(len(hay) - room + 1)
    haystack = list(hay[start : start + room])
    position = round(depth * room)
    return Prompt([*prefix, *haystack[:position], *statement, *haystack[position:], *question], number)


def is_correct(answer: str, number: str) -> bool:
    """Return whether the first number of an answer is exactly the needle's.

    Args:
        answer: Text that the model generated.
        number: Digits of the needle.
    """
    first = re.match(r"\D*(\d+)", answer)
    return first is not None and first[1] == number


def find_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    hay: Sequence[int],
    caches: Caches,
    lengths: Sequence[int],
    options: NeedleOptions | None = None,
) -> dict[str, list[Cell]]:
    """Count the needles that a model finds through each cache.

    All caches get the same prompts. Prompts are read in chunks through the cache, so that the question attends to what
    the cache stores, and answered greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        hay: Token ids of the text.
        caches: The caches.
        lengths: Context lengths.
        options: Options of placing and reading needles.

    Returns:
        By cache, one cell per length and depth.

    Raises:
        ValueError: A prompt cannot be made, or the model returns NaN or infinity.
    """
    o = options or NeedleOptions()
    depths = depths_of(o.depths)
    cells: dict[str, list[Cell]] = {name: [] for name in caches}
    for length in lengths:
        prompts = [
            make_prompt(
                tokenizer, hay, o.template, length=length, depth=depth, seed=f"{o.seed}/{length}/{depth}/{trial}"
            )
            for depth in depths
            for trial in range(o.trials)
        ]
        for name, new_cache in caches.items():
            hits: list[bool] = []
            for first in range(0, len(prompts), o.batch_size):
                batch = prompts[first : first + o.batch_size]
                ids = torch.tensor([p.ids for p in batch])
                answers = continue_greedily(model, ids, new_cache(), chunk=o.chunk, tokens=answer_tokens(o.template))
                texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
                hits += [is_correct(text, prompt.number) for text, prompt in zip(texts, batch, strict=True)]
            for i, depth in enumerate(depths):
                count = sum(hits[i * o.trials : (i + 1) * o.trials])
                cells[name].append(Cell(length, depth, count, o.trials))
    return cells
