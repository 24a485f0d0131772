"""Contamination: verbatim overlap between an evaluation set and a calibration or recovery set.

The measure is that of GPT-3 (arXiv 2005.14165, appendix C): n-grams of 13 words, lower case, without punctuation.
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
    """Overlap of an evaluation set with a set of texts.

    Attributes:
        n: Words per n-gram.
        documents: Documents of the evaluation set.
        judged: Documents of at least n words; shorter ones have no n-gram.
        hit: Judged documents that share at least one n-gram with the texts.
        ngrams: Distinct n-grams of the evaluation set.
        shared: Distinct n-grams of the evaluation set that the texts contain too.
    """

    n: int
    documents: int
    judged: int
    hit: int
    ngrams: int
    shared: int


def ngrams(text: str, n: int = NGRAM) -> Iterator[int]:
    """Hash every n-gram of a text; hashes are only comparable within one process.

    Args:
        text: The text; only its words count, in lower case.
        n: Words per n-gram.

    Returns:
        One hash per n-gram, repeated ones included; none for a text of fewer than n words.
    """
    words = _WORD.findall(text.lower())
    return (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))


def index(texts: Iterable[str], n: int = NGRAM) -> set[int]:
    """Return the hashes of all n-grams of a set of texts.

    Args:
        texts: The texts; no n-gram spans two of them.
        n: Words per n-gram.
    """
    return {gram for text in texts for gram in ngrams(text, n)}


def overlap(indexed: set[int], documents: Iterable[str], n: int = NGRAM) -> Overlap:
    """Measure the overlap of an evaluation set with a set of texts.

    Args:
        indexed: Result of `index` for the texts, with the same n.
        documents: Documents of the evaluation set.
        n: Words per n-gram.

    Returns:
        The counts.
    """
    count = judged = hit = 0
    distinct: set[int] = set()
    for document in documents:
        grams = set(ngrams(document, n))
        count += 1
        judged += bool(grams)
        hit += not indexed.isdisjoint(grams)
        distinct |= grams
    return Overlap(n, count, judged, hit, len(distinct), len(distinct & indexed))


def evaluation_texts(dataset: str, *, split: str = "test", config: str | None = None) -> Iterator[str]:
    """Read the documents of an evaluation set.

    Args:
        dataset: Local file or data set of the Hub.
        split: Split of a data set of the Hub.
        config: Config of a data set of the Hub.

    Yields:
        One text per row: all strings of the row (question, choices, answer) joined by newlines.

    Raises:
        ValueError: The set cannot be read.
    """
    for row, _ in read_rows(dataset, split=split, config=config):
        yield "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
