"""Text and instructions in stated proportions, as sequences to train on.

The order is a function of the seed alone: at every point of it each part has had its share, to within one sequence. So
a run that goes on after a kill needs to know only how many sequences it has seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.config import Config
from laconic.data.instructions import MaskedTokens, read_conversations
from laconic.data.text import bos_prefix, concatenate_tokens, read_documents


class TextSource(Config):
    """One dataset of a mix. weight: its share of the sequences, as a ratio to the other parts'. answers_only: of
    instructions, learn what the assistant says alone. limit: take no more sequences than these. license, source,
    domain: for the data card."""

    dataset: str
    format: Literal["text", "instruction"] = "text"
    weight: float = Field(1.0, gt=0, le=1e6)
    split: str = "train"
    config: str | None = None
    answers_only: bool = True
    limit: int | None = Field(None, ge=1)
    license: str | None = None
    source: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Example:
    """ids: (n,) int64. loss_mask: (n,) bool, the tokens to be predicted from those before them; never the first."""

    ids: Tensor
    loss_mask: Tensor

    @property
    def targets(self) -> int:
        """How many tokens are to be predicted."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Mix:
    """parts: the sequences of each part to train on. shares: what each is to have of all, adding up to 1. held_out:
    sequences of all parts that are not trained on, about in the same proportions. dropped: of instructions, how many
    had nothing to learn within the length."""

    parts: tuple[tuple[Example, ...], ...]
    shares: tuple[float, ...]
    held_out: tuple[Example, ...]
    seed: int
    dropped: int = 0

    @property
    def epoch(self) -> int:
        """Sequences in an epoch: so many that no part comes round a second time."""
        return max(1, int(min(len(p) / share for p, share in zip(self.parts, self.shares, strict=True)) + 1e-9))

    def order(self, count: int) -> list[tuple[int, int]]:
        """The first `count` sequences: number of the part, and number within it. A part that is through begins again,
        in another order."""
        taken = [0] * len(self.parts)
        order: list[tuple[int, int]] = []
        shuffled: dict[int, list[int]] = {}
        for n in range(1, count + 1):
            # Whoever is furthest behind its share.
            p = max(range(len(taken)), key=lambda i: self.shares[i] * n - taken[i])
            size = len(self.parts[p])
            if taken[p] % size == 0:
                seed = self.seed * 1_000_003 + p * 8191 + taken[p] // size
                generator = torch.Generator().manual_seed(seed % 2**63)
                shuffled[p] = torch.randperm(size, generator=generator).tolist()
            order.append((p, shuffled[p][taken[p] % size]))
            taken[p] += 1
        return order

    def at(self, place: tuple[int, int]) -> Example:
        """The sequence at a place of the order."""
        return self.parts[place[0]][place[1]]

    @property
    def highest(self) -> int:
        """The highest token id."""
        return max(int(e.ids.max()) for part in (*self.parts, self.held_out) for e in part)

    @property
    def sha256(self) -> str:
        """Of every token, and what is loss_mask of it."""
        digest = hashlib.sha256(repr((self.shares, self.seed)).encode())
        for part in (*self.parts, self.held_out):
            for example in part:
                digest.update(example.ids.numpy().tobytes() + example.loss_mask.numpy().tobytes())
        return digest.hexdigest()


def read_mix(
    parts: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    held_out: float,
    held_out_samples: int,
    seed: int,
) -> Mix:
    """Read datasets and cut them into sequences of at most `length` tokens.

    held_out: the share of each part that is not trained on; held_out_samples: at most so many sequences of all parts.
    Raises: ValueError for a dataset that cannot be read, or has too little.
    """
    weights = sum(p.weight for p in parts)
    shares = tuple(p.weight / weights for p in parts)
    training: list[tuple[Example, ...]] = []
    kept: list[Example] = []
    dropped = 0
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        found = _windows(part, tokenizer, length) if part.format == "text" else _answers(part, tokenizer, length)
        examples = [e for e in found if e.targets]
        dropped += len(found) - len(examples)
        if not examples:
            raise ValueError(
                f"data.{number}: {part.dataset} has no answer that begins within {length} tokens; raise "
                "max_seq_length, or see whether an assistant says anything there"
            )
        count = 0
        if held_out:
            count = max(1, min(round(held_out * len(examples)), round(share * held_out_samples)))
        if count >= len(examples):
            raise ValueError(
                f"data.{number}: {part.dataset} gives {len(examples)} sequence(s) of {length} tokens, too few to hold "
                f"some out; give more text, lower max_seq_length, or set held_out: 0"
            )
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        kept += [examples[i] for i in sorted(chosen[:count])]
        training.append(tuple(examples[i] for i in sorted(chosen[count:])))
    return Mix(tuple(training), shares, tuple(kept), seed, dropped)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """ids, loss_mask: (n, longest). What fills up the shorter ones comes after their end, where nothing looks at it."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    loss_mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        loss_mask[row, : len(example.ids)] = example.loss_mask
    return ids, loss_mask


def _windows(part: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Documents joined, and cut into windows of one length, each led by BOS where the tokenizer puts one."""
    prefix = bos_prefix(tokenizer)
    body = length - len(prefix)
    documents = read_documents(part.dataset, split=part.split, config=part.config)
    stream = list(islice(concatenate_tokens(documents, tokenizer, prefix), part.limit and part.limit * body))
    if len(stream) < body:
        if not stream:
            raise ValueError(f"{part.dataset} is empty; name another dataset")
        raise ValueError(
            f"{part.dataset} has {len(stream)} tokens, less than one sequence of {length}; give more text, or lower "
            "max_seq_length"
        )
    windows = torch.tensor(stream[: len(stream) // body * body]).view(-1, body)
    lead = torch.tensor(prefix, dtype=torch.long).expand(len(windows), -1)
    loss_mask = torch.ones(length, dtype=torch.bool)
    loss_mask[0] = False
    return [Example(ids, loss_mask) for ids in torch.cat([lead, windows], 1)]


def _answers(part: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """One sequence a conversation, cut at its end where it is too long."""
    found: Iterator[MaskedTokens] = read_conversations(
        part.dataset, tokenizer, split=part.split, config=part.config, answers_only=part.answers_only
    )
    examples = []
    for ids, loss_mask in islice(found, part.limit):
        told = torch.tensor(loss_mask[:length], dtype=torch.bool)
        told[:1] = False
        examples.append(Example(torch.tensor(ids[:length]), told))
    if not examples:
        raise ValueError(f"{part.dataset} is empty; name another dataset")
    return examples


def describe_mix(mix: Mix, parts: Sequence[TextSource], order: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """What the mix came to: of each part its sequences, and its share of the sequences and target tokens in `order`."""
    tokens = [0] * len(parts)
    for place in order:
        tokens[place[0]] += mix.at(place).targets
    seen = [sum(p == i for p, _ in order) for i in range(len(parts))]
    return [
        {
            "dataset": part.dataset,
            "format": part.format,
            "sequences": len(mix.parts[i]),
            "share": seen[i] / max(1, len(order)),
            "token_share": tokens[i] / max(1, sum(tokens)),
        }
        for i, part in enumerate(parts)
    ]
