"""Which languages a text is in, by py3langid (97 languages, its model within the package), where that is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# A piece is long enough to tell, and so many of them that a share is known to a few percent.
PIECES, CHARACTERS = 256, 600


def language_mix(texts: Sequence[str]) -> dict[str, float] | None:
    """The share of pieces of a set by language (ISO 639-1), most first; None without py3langid, or without text.

    A piece is at most 600 characters from the middle of a text; texts are taken at even distances. Source code is no
    language to the detector, which calls it whatever is nearest, mostly English.
    """
    try:
        from py3langid import classify
    except ImportError:
        return None
    step = max(1, -(-len(texts) // PIECES))
    counts: Counter[str] = Counter()
    for text in texts[::step]:
        middle = max(0, (len(text) - CHARACTERS) // 2)
        if piece := text[middle : middle + CHARACTERS].strip():
            counts[str(classify(piece)[0])] += 1
    total = sum(counts.values())
    return {language: n / total for language, n in counts.most_common()} if total else None
