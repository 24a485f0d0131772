"""Contamination: how much of an evaluation set stands in a calibration or recovery set, word for word.

As GPT-3 did it (arXiv 2005.14165, appendix C): runs of 13 words, lower case, without punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from laconic.data.text import read_rows

NGRAM = 13
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """documents: of the evaluation set. judged: those of n words or more; shorter ones cannot be judged. hit: those of
    them that share at least one run of n words with the set. ngrams: different runs of n words in the evaluation set;
    shared: those of them that the set has too."""

    n: int
    documents: int
    judged: int
    hit: int
    ngrams: int
    shared: int


def ngrams(text: str, n: int = NGRAM) -> Iterator[int]:
    """Every run of n words of a text, hashed. Hashes of two processes do not compare."""
    words = _WORD.findall(text.lower())
    return (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))


def index(texts: Iterable[str], n: int = NGRAM) -> set[int]:
    """All runs of n words of a set."""
    return {gram for text in texts for gram in ngrams(text, n)}


def overlap(seen: set[int], documents: Iterable[str], n: int = NGRAM) -> Overlap:
    """Compare an evaluation set with what `index` found in another, for the same n."""
    count = judged = hit = 0
    found: set[int] = set()
    for document in documents:
        grams = set(ngrams(document, n))
        count += 1
        judged += bool(grams)
        hit += not seen.isdisjoint(grams)
        found |= grams
    return Overlap(n, count, judged, hit, len(found), len(found & seen))


def evaluation_texts(dataset: str, *, split: str = "test", config: str | None = None) -> Iterator[str]:
    """Documents of an evaluation set: of a text, its `text`; of a task's row, all words in it (question, choices,
    answer) in one.

    Raises: ValueError when it cannot be read.
    """
    for row, _ in read_rows(dataset, split=split, config=config):
        yield "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
