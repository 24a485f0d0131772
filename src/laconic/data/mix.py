"""Mixes of text and instruction datasets in given proportions, as sequences for training.

The order of sequences depends on the seed alone: after any number of them each source has had its share, to within one
sequence. A resumed run therefore needs to know only how many sequences were used.
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
    """One dataset of a mix.

    Attributes:
        dataset: A local file or a Hub name.
        format: `text`, or `instruction` for conversations.
        weight: Share of the sequences, relative to the weights of the other sources.
        split: Split of a Hub dataset.
        config: Configuration of a Hub dataset.
        answers_only: Whether only the assistant's messages of a conversation are learned.
        limit: Largest number of sequences to use.
        license: License of the dataset, for the data card.
        source: Origin of the dataset, for the data card.
        domain: Domain of the text, for the data card.
    """

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
    """A training sequence.

    Attributes:
        ids: (n,) int64, token ids.
        loss_mask: (n,) bool, tokens to be predicted from those before them; False for the first.
    """

    ids: Tensor
    loss_mask: Tensor

    @property
    def targets(self) -> int:
        """Number of tokens to be predicted."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Mix:
    """Training and held-out sequences of several sources.

    Attributes:
        parts: Training sequences of each source.
        shares: Share of each source in the order of sequences; they sum to 1.
        held_out: Sequences of all sources that are not trained on, in about the same proportions.
        seed: Seed of the order.
        dropped: Number of conversations with no token to predict within the length.
    """

    parts: tuple[tuple[Example, ...], ...]
    shares: tuple[float, ...]
    held_out: tuple[Example, ...]
    seed: int
    dropped: int = 0

    @property
    def epoch(self) -> int:
        """Number of sequences in an epoch: as many as can be used before any source repeats one."""
        return max(1, int(min(len(p) / share for p, share in zip(self.parts, self.shares, strict=True)) + 1e-9))

    def order(self, count: int) -> list[tuple[int, int]]:
        """List the first `count` sequences of the order.

        A source whose sequences are used up starts again, in another random order.

        Args:
            count: Number of sequences.

        Returns:
            Pairs of the number of the source and the number of the sequence within it.
        """
        counts = [0] * len(self.parts)
        order: list[tuple[int, int]] = []
        shuffled: dict[int, list[int]] = {}
        for n in range(1, count + 1):
            # Take from the source that is furthest below its share.
            p = max(range(len(counts)), key=lambda i: self.shares[i] * n - counts[i])
            size = len(self.parts[p])
            if counts[p] % size == 0:
                seed = self.seed * 1_000_003 + p * 8191 + counts[p] // size
                generator = torch.Generator().manual_seed(seed % 2**63)
                shuffled[p] = torch.randperm(size, generator=generator).tolist()
            order.append((p, shuffled[p][counts[p] % size]))
            counts[p] += 1
        return order

    def at(self, place: tuple[int, int]) -> Example:
        """Return the sequence at an entry of the order.

        Args:
            place: Numbers of the source and of the sequence within it.
        """
        return self.parts[place[0]][place[1]]

    @property
    def highest(self) -> int:
        """Highest token id."""
        return max(int(e.ids.max()) for part in (*self.parts, self.held_out) for e in part)

    @property
    def sha256(self) -> str:
        """Hash of every token id and loss mask, the shares and the seed."""
        digest = hashlib.sha256(repr((self.shares, self.seed)).encode())
        for part in (*self.parts, self.held_out):
            for example in part:
                digest.update(example.ids.numpy().tobytes() + example.loss_mask.numpy().tobytes())
        return digest.hexdigest()


def read_mix(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    held_out: float,
    held_out_samples: int,
    seed: int,
) -> Mix:
    """Read datasets, cut them into sequences, and hold some sequences out.

    Args:
        sources: The datasets.
        tokenizer: The tokenizer.
        length: Largest number of tokens of a sequence.
        held_out: Share of the sequences of each source that is not trained on.
        held_out_samples: Largest number of held-out sequences of all sources together.
        seed: Seed of the choice of held-out sequences and of the order.

    Returns:
        The mix; sequences without a token to predict are dropped.

    Raises:
        ValueError: A dataset cannot be read, or is too small.
    """
    weights = sum(s.weight for s in sources)
    shares = tuple(s.weight / weights for s in sources)
    training: list[tuple[Example, ...]] = []
    validation: list[Example] = []
    dropped = 0
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        read = _windows if source.format == "text" else _conversations
        sequences = read(source, tokenizer, length)
        examples = [e for e in sequences if e.targets]
        dropped += len(sequences) - len(examples)
        if not examples:
            raise ValueError(
                f"data.{number}: {source.dataset} has no answer that begins within {length} tokens; raise "
                "max_seq_length, or check that it has messages of an assistant"
            )
        count = 0
        if held_out:
            count = max(1, min(round(held_out * len(examples)), round(share * held_out_samples)))
        if count >= len(examples):
            raise ValueError(
                f"data.{number}: {source.dataset} gives {len(examples)} sequence(s) of {length} tokens, too few to "
                f"hold some out; give more text, lower max_seq_length, or set held_out: 0"
            )
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        validation += [examples[i] for i in sorted(chosen[:count])]
        training.append(tuple(examples[i] for i in sorted(chosen[count:])))
    return Mix(tuple(training), shares, tuple(validation), seed, dropped)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right to the longest, with token 0 outside the loss mask.

    Args:
        examples: The sequences, one or more.

    Returns:
        ids (n, longest) int64 and loss_mask (n, longest) bool.
    """
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    loss_mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        loss_mask[row, : len(example.ids)] = example.loss_mask
    return ids, loss_mask


def _windows(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Cut the concatenated documents of a source into windows of one length, each with the tokenizer's prefix."""
    prefix = bos_prefix(tokenizer)
    body = length - len(prefix)
    documents = read_documents(source.dataset, split=source.split, config=source.config)
    stream = list(islice(concatenate_tokens(documents, tokenizer, prefix), source.limit and source.limit * body))
    if len(stream) < body:
        if not stream:
            raise ValueError(f"{source.dataset} is empty; name another dataset")
        raise ValueError(
            f"{source.dataset} has {len(stream)} tokens, less than one sequence of {length}; give more text, or lower "
            "max_seq_length"
        )
    windows = torch.tensor(stream[: len(stream) // body * body]).view(-1, body)
    lead = torch.tensor(prefix, dtype=torch.long).expand(len(windows), -1)
    loss_mask = torch.ones(length, dtype=torch.bool)
    loss_mask[0] = False
    return [Example(ids, loss_mask) for ids in torch.cat([lead, windows], 1)]


def _conversations(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Make one sequence of each conversation of a source, cut at the end if it is too long."""
    conversations: Iterator[MaskedTokens] = read_conversations(
        source.dataset, tokenizer, split=source.split, config=source.config, answers_only=source.answers_only
    )
    examples = []
    for ids, mask in islice(conversations, source.limit):
        loss_mask = torch.tensor(mask[:length], dtype=torch.bool)
        loss_mask[:1] = False
        examples.append(Example(torch.tensor(ids[:length]), loss_mask))
    if not examples:
        raise ValueError(f"{source.dataset} is empty; name another dataset")
    return examples


def describe_mix(mix: Mix, sources: Sequence[TextSource], order: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Describe the sources of a mix for the log.

    Args:
        mix: The mix.
        sources: Its sources.
        order: The sequences that were trained on.

    Returns:
        For each source its dataset and format, its number of sequences, and its shares of sequences and target tokens.
    """
    tokens = [0] * len(sources)
    for place in order:
        tokens[place[0]] += mix.at(place).targets
    counts = [sum(p == i for p, _ in order) for i in range(len(sources))]
    return [
        {
            "dataset": source.dataset,
            "format": source.format,
            "sequences": len(mix.parts[i]),
            "share": counts[i] / max(1, len(order)),
            "token_share": tokens[i] / max(1, sum(tokens)),
        }
        for i, source in enumerate(sources)
    ]
